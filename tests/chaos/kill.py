"""kill -9 at random moments of a training run, which is started again until it is done.

A case is one kill. Every number that was logged, and the parameters in the end, must be
those of a run that nobody killed, and no step that was saved may be computed again.
"""

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.training.metrics import read_events
from tests.chaos._forks import run_jobs, start, train_there
from tests.chaos._small_run import different, newest, strayed, write_config

FULL, SLICE = 1000, 20
LONGEST = 120  # seconds that a process may take to come to its first step
MAX_EVENTS = 60  # of a process, before it is killed
MAX_START_SECONDS = 3.0  # of one that is killed without regard to its events


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each kill."""
    write_config(folder)
    whole, count = folder / "whole", 0
    if fault := run_jobs((train_there, folder, whole)):
        yield from [fault] * len(cases)
        return
    for case in cases:
        rng, fault = random.Random(f"{seed} {case}"), None
        while fault is None:
            run_dir = folder / f"run{count}"
            if (run_dir / "model" / "model.safetensors").is_file():
                count += 1
                continue
            fault = kill(rng, folder, run_dir, whole)
        if case == cases[-1] and not fault:
            fault = run_jobs((train_there, folder, run_dir)) or different(run_dir, whole)
        yield fault


def kill(rng: random.Random, folder: Path, run_dir: Path, whole: Path) -> str | None:
    """Starts the run, kills it, and says what is wrong with what is left.

    None: it came to a good end before it was killed.
    """
    before, saved = resumes(run_dir), newest(run_dir)
    process, receiver = start(train_there, folder, run_dir)
    if rng.random() < 0.75:  # in training, else perhaps in what comes before it
        target = count_lines(run_dir) + rng.randint(1, MAX_EVENTS)
        deadline = time.monotonic() + LONGEST
        while process.is_alive() and count_lines(run_dir) < target and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
    else:
        time.sleep(rng.uniform(0, MAX_START_SECONDS))
    process.kill()
    process.join()
    with contextlib.closing(receiver), contextlib.suppress(EOFError):
        return receiver.recv() or different(run_dir, whole) or None
    after = resumes(run_dir)
    if len(after) > len(before) and after[-1] < saved:
        return f"went on from step {after[-1]} although {saved} was saved"
    return strayed(run_dir, whole)


def resumes(run_dir: Path) -> list[int]:
    """The steps from which the run went on."""
    events = read_events(run_dir / "metrics.jsonl")
    return [event["step"] for event in events if event["event"] == "resume"]


def count_lines(run_dir: Path) -> int:
    """Lines that the run has logged."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
