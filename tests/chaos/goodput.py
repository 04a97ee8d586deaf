"""A fault every 20 s in a supervised run, until nobody has had to do anything.

After the last fault the run finishes; its result must be that of the undisturbed
run. The share of steps that were computed for the first time is printed.
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

from tests.chaos._damage import flip_bit
from tests.chaos._runs import different, newest, run_jobs, train_there
from tests.processes import cache_options, started, write_config

FULL, SLICE = 30, 1
EVERY = 20.0  # seconds from fault to fault
PAUSE = 0.05  # seconds that a step takes longer than it would
HANG_TIMEOUT = 15.0  # seconds, more than the start of a process takes
LIMIT = 600  # seconds from the last fault to the end
SUPERVISE = (
    "import sys; from gptjax.runtime.supervisor import "
    f"supervise; sys.exit(supervise(sys.argv[1:], {HANG_TIMEOUT}))"
)


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    # More steps than can be made while there are faults, but not many more.
    steps = round(len(cases) * EVERY / PAUSE * 0.7)
    write_config(folder, train__steps=steps, train__eval_every=100, checkpoint__every=20)
    if fault := run_jobs((train_there, folder, folder / "whole")):
        raise RuntimeError(fault)
    slow = ["tests.chaos._disturbed", "gptjax.training.metrics", "log_train_metrics"]
    train = [sys.executable, "-m", *slow, "0", f"{PAUSE}", "train", "config.toml", "--run", "run"]
    command = [sys.executable, "-c", SUPERVISE, *train]
    variables = cache_options(folder) | {"PYTHONUNBUFFERED": "1"}
    with started([command], [folder], **variables) as (parent,):
        for case in cases:
            time.sleep(EVERY if case else EVERY / 2)
            children = Path(f"/proc/{parent.popen.pid}/task/{parent.popen.pid}/children")
            with contextlib.suppress(OSError, IndexError):
                pid = int(children.read_text().split()[0])
                cause_fault(case, pid, folder / "run", random.Random(f"{seed} {case}"))
            if case != cases[-1]:
                ended = parent.popen.poll()
                yield f"exit code {ended}: {parent.complained()}" if ended else ""
        ended = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = parent.popen.wait(LIMIT)
    # How much of the work was not done again, by the lines of logged steps.
    steps_done = [x.split("/")[0] for x in parent.said().splitlines() if "| loss" in x]
    first, every = len(set(steps_done)), len(steps_done)
    print(f"goodput: {first} of {every} steps were first ones, {first / max(every, 1):.1%}")
    wrong = "" if ended == 0 else f"exit code {ended}: {parent.complained()[-2000:]}"
    yield wrong or different(folder / "run", folder / "whole")


def cause_fault(case: int, child: int, run_dir: Path, rng: random.Random) -> None:
    if case % 4 == 0:
        saved = run_dir / "checkpoints" / str(newest(run_dir))
        with contextlib.suppress(LookupError, OSError, ValueError):  # replaced in the meantime
            path = rng.choice(sorted(path for path in saved.rglob("*") if path.is_file()))
            path.write_bytes(flip_bit(path.read_bytes(), rng))
    if case % 4 < 3:
        os.kill(child, signal.SIGSTOP if case % 4 == 2 else signal.SIGKILL)
    else:  # no file of the process can grow beyond a few bytes
        _, hard = resource.prlimit(child, resource.RLIMIT_FSIZE)
        resource.prlimit(child, resource.RLIMIT_FSIZE, (rng.randrange(5000), hard))
