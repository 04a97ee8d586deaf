"""kill -9 at random moments of a training run, which is started again until it is done.

A case is one kill. Every number that was logged, and the parameters in the end, must be
those of a run that nobody killed, and no step that was saved may be computed again. The
processes are forked from one that has imported everything and has computed nothing. How
long they live is a share of what this machine takes for a whole run.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.training.metrics import read_events
from tests.chaos._small_run import different, environment, newest, run_whole, strayed, write_config

FULL, SLICE = 1000, 20
LONGEST = 120  # seconds that a process may take to come to its first step


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each kill."""
    write_config(folder)
    run_whole(folder)
    command = [sys.executable, "-m", "tests.chaos.kill", str(seed)]
    process = subprocess.Popen(
        [*command, *map(str, cases)],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield from map(json.loads, process.stdout or ())


def main(seed: int, cases: Sequence[int]) -> None:
    """Kills, and writes a line of JSON for each case; in the folder of the runs."""
    from gptjax.tasks import pretrain  # noqa: F401 (for the children)

    whole, count = Path("whole"), 0
    folder, pace = Path("run0"), undisturbed()
    for case in cases:
        lot, fault = random.Random(f"{seed} {case}"), None
        while fault is None:
            if (folder / "model" / "model.safetensors").is_file():
                count += 1
                folder = Path(f"run{count}")
            fault = killed(lot, folder, whole, pace)
        if case == cases[-1] and not fault:
            fault = ended(start(folder), folder) or different(folder, whole)
        print(json.dumps(fault), flush=True)


class Pace(NamedTuple):
    """Seconds of a run that nobody kills."""

    whole: float
    logged: float  # of these, since its first line in metrics.jsonl


def undisturbed() -> Pace:
    """How long a run takes; the second of two, as the first one compiles."""
    for run in map(Path, ("cold", "warm")):
        started, child, logged = time.monotonic(), start(run), 0.0
        while alive(child):
            time.sleep(0.005)
            if not logged and size(run):
                logged = time.monotonic()
        if fault := ended(child, run):
            sys.exit(fault)
        done = time.monotonic()
        pace = Pace(done - started, done - logged)
    return pace


def killed(lot: random.Random, run: Path, whole: Path, pace: Pace) -> str | None:
    """Starts the run, kills it, and says what is wrong with what is left.

    None: it came to a good end before it was killed.
    """
    before, saved, lines = resumes(run), newest(run), size(run)
    child = start(run)
    if lot.random() < 0.75:  # in training, else perhaps in what comes before it
        end = time.monotonic() + LONGEST
        while alive(child) and size(run) <= lines and time.monotonic() < end:
            time.sleep(0.005)
            lines = min(lines, size(run))
        time.sleep(lot.uniform(0, pace.logged / 2))
    else:
        time.sleep(lot.uniform(0, pace.whole))
    if not alive(child):
        return ended(child, run) or different(run, whole) or None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    after = resumes(run)
    if len(after) > len(before) and after[-1] < saved:
        return f"went on from step {after[-1]} although {saved} was saved"
    return strayed(run, whole)


def start(run: Path) -> int:
    """Forks a process that trains; its number."""
    child = os.fork()
    if child:
        DONE.pop(child, None)  # of an earlier one of that number
        return child
    code = 1
    try:
        from gptjax.config import load_config
        from gptjax.runtime.compilation_cache import enable_cache
        from gptjax.tasks.train import train

        with enable_cache(Path("compiled")):
            train(load_config(Path("config.toml")), run)
        code = 0
    except BaseException:
        Path(f"{run}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


DONE: dict[int, int] = {}  # exit codes of children that ended by themselves


def alive(child: int) -> bool:
    """Whether it still runs."""
    if child not in DONE:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            DONE[child] = os.waitstatus_to_exitcode(status)
    return child not in DONE


def ended(child: int, run: Path) -> str:
    """Waits for the end of a process, and says why it was no good one."""
    while alive(child):
        time.sleep(0.01)
    if DONE[child]:
        with contextlib.suppress(OSError):
            return Path(f"{run}.error").read_text()
        return f"ended with exit code {DONE[child]}"
    return ""


def resumes(run: Path) -> list[int]:
    """The steps from which the run went on."""
    events = read_events(run / "metrics.jsonl")
    return [event["step"] for event in events if event["event"] == "resume"]


def size(run: Path) -> int:
    """Bytes of what the run has logged."""
    try:
        return (run / "metrics.jsonl").stat().st_size
    except FileNotFoundError:  # a start that has nothing to go on from takes it away
        return 0


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
