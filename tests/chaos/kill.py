"""kill -9 at random moments of a training run, which is started again until it is done.

A case is one kill. Every number that was logged, and the parameters in the end, must be
those of a run that nobody killed, and no step that was saved may be computed again.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

from gptjax.training.metrics import read_events
from tests.chaos._runs import different, newest, run_jobs, start, strayed, train_there
from tests.processes import write_config

FULL, SLICE = 1000, 3
MAX_EVENTS = 60  # of a process, before it is killed
MAX_START_SECONDS = 3.0  # of one that is killed without regard to its events


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    write_config(folder, train__steps=60, train__eval_every=10, checkpoint__every=3)
    whole, runs = folder / "whole", [folder / "run0"]
    if fault := run_jobs((train_there, folder, whole)):
        raise RuntimeError(fault)

    def check(case: int, rng: random.Random) -> str:
        while (fault := kill(rng, folder, runs[-1], whole)) is None:
            runs.append(folder / f"run{len(runs)}")
        if not fault and case % 50 == SLICE - 1:
            fault = run_jobs((train_there, folder, runs[-1])) or different(runs[-1], whole)
            runs.append(folder / f"run{len(runs)}")
        return fault

    return check


def kill(rng: random.Random, folder: Path, run_dir: Path, whole: Path) -> str | None:
    """Starts the run and kills it; None: it came to a good end before that."""
    before, saved = resumes(run_dir), newest(run_dir)
    target = count_lines(run_dir) + rng.randint(1, MAX_EVENTS)
    seconds = 120.0
    if rng.random() < 0.25:  # perhaps in what comes before training
        target, seconds = 10**9, rng.uniform(0, MAX_START_SECONDS)
    process, receiver = start(train_there, folder, run_dir)
    deadline = time.monotonic() + seconds
    while process.is_alive() and count_lines(run_dir) < target and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.join()
    try:
        return receiver.recv() or different(run_dir, whole) or None
    except EOFError:  # it was killed
        after = resumes(run_dir)
    finally:
        receiver.close()
    if len(after) > len(before) and after[-1] < saved:
        return f"went on from step {after[-1]} although {saved} was saved"
    return strayed(run_dir, whole)


def resumes(run_dir: Path) -> list[int]:
    events = read_events(run_dir / "metrics.jsonl")
    return [event["step"] for event in events if event["event"] == "resume"]


def count_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
