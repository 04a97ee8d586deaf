"""SIGTERM in each phase of a run, of one process or of two that train together.

The process has to end with 75 and one line, with all progress saved, and the same
command again has to end where the undisturbed run did. Of two processes one gets the
signal.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.chaos._runs import different, newest, numbers
from tests.processes import (
    cache_options,
    exit_codes,
    read_without_noise,
    started,
    train,
    write_config,
)
from tests.runs import delete_after

SAVED = 21  # the last checkpoint of runs that are resumed
# Where the signal comes: in which call of which function.
PHASES = {
    "a step": "gptjax.training.metrics log_train_metrics 5",
    "saving": "gptjax.checkpoint.checkpoint write_step 2",
    "compiling again": "gptjax.training.trainer aot_compile 1",
    "reading data": "gptjax.tasks.pretrain open_dataset 1",
    "restoring": "gptjax.checkpoint.checkpoint restore 1",
    "compiling": "gptjax.training.trainer aot_compile 1",
    "evaluating": "gptjax.evaluation.perplexity evaluate 2",
    "starting": "gptjax.__main__ open_closed_streams 1",
    "importing": "gptjax.cli.train setup_session 1",
    "making parameters": "gptjax.tasks.pretrain make_initial_params 1",
    "first evaluation": "gptjax.evaluation.perplexity evaluate 1",
    "sampling": "gptjax.tasks.pretrain complete 2",
    "finishing": "gptjax.tasks.pretrain write_report 1",
}
RESUMED = ("compiling again", "restoring")  # something was saved before
FULL, SLICE = 2 * len(PHASES), 1


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    def check(case: int, rng: random.Random) -> str:
        name = list(PHASES)[case % len(PHASES)]
        count = case // len(PHASES) + 1
        whole = folder / f"whole{count}"
        if not whole.exists():
            changes = {"train__sample_prompt": "2 times", "train__steps": 24}
            write_config(whole, train__eval_every=10, checkpoint__every=3, **changes)
            if any(codes := gptjax(whole, count)):
                return f"the undisturbed run ended with {codes}"
        fault = find_fault(folder / f"case{case}", whole, count, name, rng)
        return fault and f"{name}, {count} processes: {fault}"

    return check


def find_fault(here: Path, whole: Path, count: int, name: str, rng: random.Random) -> str:
    shutil.copytree(whole, here)
    log = here / "run" / "metrics.jsonl"
    if name in RESUMED:
        delete_after(here / "run" / "checkpoints", SAVED)
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(x for x in lines if json.loads(x)["step"] <= SAVED))
        shutil.rmtree(here / "run" / "model")
    else:
        shutil.rmtree(here / "run")
    # Before they have found each other, both processes get it.
    victims = range(count) if name in ("starting", "importing") else [rng.randrange(count)]
    delay = rng.random() * rng.choice((0.05, 2))  # also after the phase, such as while compiling
    codes = gptjax(here, count, [*PHASES[name].split(), f"{delay}"], victims)
    # Two processes that have finished their steps finish the rest, too.
    right = {75, 0} if (count > 1 and name == "finishing") or delay > 0.05 else {75}
    errors = [read_without_noise(path) for path in sorted(here.glob("*.err"))]
    if not set(codes) <= right or max(text.count("\n") for text in errors) > 1:
        return f"exit codes {codes}: {[text[-1500:] for text in errors]}"
    done = max((step for _, step in numbers(here / "run")), default=0)
    if done != newest(here / "run"):
        return f"step {done} was lost, {newest(here / 'run')} is saved"
    if any(codes := gptjax(here, count)):
        return f"started again, it ended with {codes}"
    return different(here / "run", whole / "run")


def gptjax(
    folder: Path, count: int, trigger: Sequence[str] = (), victims: Sequence[int] = ()
) -> list[int]:
    commands = train(count, "config.toml", "--run", "run")
    for number in victims:
        commands[number][1:3] = ["-m", "tests.chaos._disturbed", *trigger]
    with started(commands, [folder] * count, **cache_options(folder.parent)) as processes:
        return exit_codes(processes)
