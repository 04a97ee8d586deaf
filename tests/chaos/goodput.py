"""A fault every 20 s in a supervised run, until nobody has had to do anything.

A case is a fault: a kill, a process that is stopped, a disk that is full for it, or the
newest checkpoint damaged. After the last one the run goes on to its end, which must be
that of the undisturbed run. The share of steps that were computed for the first time is
printed.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.chaos._damage import flip_bit_of
from tests.chaos._forks import run_jobs, train_there
from tests.chaos._small_run import different, environment, newest, write_config

FULL, SLICE = 30, 3
EVERY = 20.0  # seconds from fault to fault
PAUSE = 0.05  # seconds that a step takes longer than it would
HANG_TIMEOUT = 15.0  # seconds, more than the start of a process takes
LIMIT = 600  # seconds from the last fault to the end
SUPERVISE = (
    "import sys; from gptjax.runtime.supervisor import "
    f"supervise; sys.exit(supervise(sys.argv[1:], {HANG_TIMEOUT}))"
)


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What each fault did that it should not have."""
    # More steps than can be made while there are faults, but not many more.
    steps = round(len(cases) * EVERY / PAUSE * 0.7)
    write_config(folder, train__steps=steps, train__eval_every=100, checkpoint__every=20)
    whole = folder / "whole"
    if fault := run_jobs((train_there, folder, whole)):
        yield from [fault] * len(cases)
        return
    slow = ["gptjax.training.metrics", "log_train_metrics", "0", f"{PAUSE}"]
    train = [sys.executable, "-m", "tests.chaos._disturbed", *slow, "train"]
    words = [*train, "config.toml", "--run", "run"]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        parent = subprocess.Popen(
            [sys.executable, "-c", SUPERVISE, *words],
            cwd=folder,
            env={**environment(folder), "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=err,
        )
        try:
            for case in cases:
                time.sleep(EVERY)
                lot = random.Random(f"{seed} {case}")
                fault = FAULTS[case % len(FAULTS)]
                with contextlib.suppress(OSError, IndexError):
                    fault(children(parent.pid)[0], folder / "run", lot)
                if case != cases[-1]:
                    yield "" if parent.poll() in (None, 0) else told(folder, parent)
            parent.wait(LIMIT)
        except subprocess.TimeoutExpired:
            yield "it never came to an end: " + told(folder, parent)
            return
        finally:
            parent.kill()  # and with it whatever it has started
            parent.wait()
    print(share(folder / "out"))
    wrong = told(folder, parent) if parent.returncode else ""
    yield wrong or different(folder / "run", whole)


def killed(child: int, run: Path, lot: random.Random) -> None:
    """Like a machine that is gone."""
    os.kill(child, signal.SIGKILL)


def stopped(child: int, run: Path, lot: random.Random) -> None:
    """Like a process that waits for something that never comes."""
    os.kill(child, signal.SIGSTOP)


def disk_full(child: int, run: Path, lot: random.Random) -> None:
    """No file of the process can grow beyond a few bytes."""
    _, hard = resource.prlimit(child, resource.RLIMIT_FSIZE)
    resource.prlimit(child, resource.RLIMIT_FSIZE, (lot.randrange(5000), hard))


def damaged(child: int, run: Path, lot: random.Random) -> None:
    """A bit of the newest checkpoint flips, and then the process is gone."""
    saved = run / "checkpoints" / str(newest(run))
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    with contextlib.suppress(IndexError, FileNotFoundError):  # replaced in the meantime
        path = lot.choice(files)
        path.write_bytes(flip_bit_of(path.read_bytes(), lot))
    os.kill(child, signal.SIGKILL)


FAULTS = (killed, stopped, disk_full, damaged)


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in found.split()]


def told(folder: Path, parent: subprocess.Popen) -> str:
    """How it ended, and the last lines of what it said."""
    lines = (folder / "err").read_text().splitlines()[-12:]
    return f"exit code {parent.poll()}: {lines}"


def share(out: Path) -> str:
    """How much of the work was not done again, by the lines of logged steps."""
    lines = [line for line in out.read_text().splitlines() if line[:5] == "step "]
    steps = [line.split("/")[0] for line in lines if "| loss" in line]
    first, every = len(set(steps)), len(steps)
    return f"goodput: {first} of {every} steps were first ones, {first / every:.1%}"
