"""SIGTERM in each phase of a run, of one process or of two that train together.

A case is a phase: the process has to end with 75, what it had computed has to be saved,
and the same command again has to end where the undisturbed run did. Of two processes
one gets the signal, but both where they have not found each other yet.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.chaos._small_run import different, environment, newest, numbers, write_config
from tests.processes import exit_codes, free_port, started
from tests.runs import delete_after

SAVED = 21  # the last checkpoint of runs that are resumed


class Phase(NamedTuple):
    """Where the signal comes: in which call of which function."""

    module: str
    function: str
    call: int = 1
    resumed: bool = False  # whether something was saved before


PHASES = {
    "reading data": Phase("gptjax.tasks.pretrain", "open_dataset"),
    "restoring": Phase("gptjax.checkpoint.checkpoint", "restore", resumed=True),
    "compiling": Phase("gptjax.training.trainer", "aot_compile"),
    "a step": Phase("gptjax.training.metrics", "log_train_metrics", 5),
    "evaluating": Phase("gptjax.evaluation.perplexity", "evaluate", 2),
    "saving": Phase("gptjax.checkpoint.checkpoint", "write_step", 2),
    "importing": Phase("gptjax.cli.train", "train_config"),
    "making parameters": Phase("gptjax.tasks.pretrain", "make_initial_params"),
    "first evaluation": Phase("gptjax.evaluation.perplexity", "evaluate"),
    "compiling again": Phase("gptjax.training.trainer", "aot_compile", resumed=True),
    "sampling": Phase("gptjax.tasks.pretrain", "complete", 2),
    "finishing": Phase("gptjax.tasks.pretrain", "write_report"),
}
FULL, SLICE = 2 * len(PHASES), 6


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong in each phase."""
    whole: dict[int, Path] = {}
    for case in cases:
        group, number = divmod(case, len(PHASES))
        count, name = group + 1, list(PHASES)[number]
        if count not in whole:
            whole[count] = folder / f"whole{count}"
            write_config(whole[count], train__sample_prompt="2 times", train__steps=24)
            (code,) = set(gptjax(whole[count], count))
            if code:
                yield from [f"the undisturbed run ended with {code}"] * len(cases)
                return
        lot = random.Random(f"{seed} {case}")
        here = folder / f"case{case}"
        yield disturbed(here, whole[count], count, name, lot)


def disturbed(here: Path, whole: Path, count: int, name: str, lot: random.Random) -> str:
    """Sends the signal in a phase, and starts again."""
    phase, victims = PHASES[name], {lot.randrange(count)}
    if name == "importing":
        victims = set(range(count))
    if phase.resumed:
        shutil.copytree(whole, here)
        delete_after(here / "run" / "checkpoints", SAVED)
        log = here / "run" / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(x for x in lines if json.loads(x)["step"] <= SAVED))
        shutil.rmtree(here / "run" / "model")
    else:
        write_config(here, train__sample_prompt="2 times", train__steps=24)
    trigger = [phase.module, phase.function, str(phase.call), f"{lot.random() / 20}"]
    codes = gptjax(here, count, trigger, victims)
    where = f"{name}, {count} processes"
    # Two processes that have finished their steps finish the rest, too.
    right = {75, 0} if count > 1 and name == "finishing" else {75}
    if not set(codes) <= right:
        errors = [path.read_text()[-1500:] for path in sorted(here.glob("*.err"))]
        return f"{where}: exit codes {codes}: {errors}"
    done = max((step for _, step in numbers(here / "run")), default=0)
    if done != newest(here / "run"):
        return f"{where}: step {done} was lost, {newest(here / 'run')} is saved"
    codes = gptjax(here, count)
    if any(codes):
        return f"{where}: started again, it ended with {codes}"
    fault = different(here / "run", whole / "run")
    return f"{where}: {fault}" if fault else ""


def gptjax(
    folder: Path, count: int, trigger: Sequence[str] = (), victims: set[int] | tuple = ()
) -> list[int]:
    """Trains in so many processes; their exit codes. Victims get the trigger."""
    port, commands = free_port(), []
    for number in range(count):
        disturbed = ["tests.chaos._disturbed", *trigger] if number in victims else ["gptjax"]
        command = [sys.executable, "-m", *disturbed, "train", "config.toml", "--run", "run"]
        if count > 1:
            command += ["--distributed", f"127.0.0.1:{port},{count},{number}"]
        commands.append(command)
    with started(commands, [folder] * count, env=environment(folder.parent)) as processes:
        return exit_codes(processes)
