"""A parent of a training process, which starts it again where it crashes or hangs.

It imports nothing heavy and holds nothing that could be lost. The child says in a file
how long it may give no sign of life (`gptjax.stopping.show_life`).
"""

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.stopping import ALIVE, SIGNALS, STOPPED

ANSWERS = (0, 2, STOPPED)  # exit codes that starting again would not change
LEAST = 60.0  # seconds without a sign of life, and without work, that are no hang
DEATHS = 3  # at the same step, then it is given up
WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before the first new start, and at most
IDLE = 0.001  # of the time: a process that computes less does nothing
TAIL = 20  # last lines of stderr that are told when it is given up
LOOK = 0.2  # seconds between two looks at the child
STACKS = 2.0  # seconds for it to write its stacks
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Death(NamedTuple):
    """How a child ended, and how far it had come."""

    step: int
    why: str


def supervise(
    command: Sequence[str],
    folder: Path,
    least: float = LEAST,
    say: Callable[[str], None] | None = None,
) -> int:
    """Runs a command until it is done, and returns its exit code.

    Args:
        command: as words; it trains in `folder`.
        folder: of the run.
        least: seconds of silence that are no hang, whatever the child says.
        say: gets each line for people; by default stderr.

    Returns:
        The exit code of the command where it is an answer: 0, 2 or 75. 1 where the
        command died three times at the same step.
    """
    say = say or (lambda text: print(f"supervise: {text}", file=sys.stderr, flush=True))
    tail: deque[str] = deque(maxlen=TAIL)
    asked: list[int] = []  # signals that came
    last, deaths, wait = None, 0, WAIT
    current: list[Any] = []  # the child of the moment
    with (
        tempfile.TemporaryDirectory(prefix="gptjax-") as scratch,
        heard(asked, current),
    ):
        sign = Path(scratch) / "alive"
        while True:
            code, hung = run_child(command, sign, least, asked, current, tail)
            if code in ANSWERS and not hung:
                return code
            if asked:
                return code if code > 0 else 128 - code
            death = Death(last_step(folder), hung or manner(code))
            same = last is not None and death.step == last.step
            deaths, wait = (deaths + 1, wait * 2) if same else (1, WAIT)
            if deaths >= DEATHS:
                say(
                    f"it {death.why} {deaths} times after step {death.step} without "
                    "getting further, so it is given up. Its last lines:"
                )
                for line in tail:
                    print(line, file=sys.stderr)
                return 1
            wait = min(wait, LONGEST_WAIT)
            say(f"it {death.why} after step {death.step}; starting again in {wait:g} s")
            last = death
            if not slept(wait, asked):
                return STOPPED


def run_child(
    command: Sequence[str],
    sign: Path,
    least: float,
    asked: list[int],
    current: list[Any],
    tail: deque[str],
) -> tuple[int, str]:
    """Runs the command once; its exit code, and what is to be said if it hung."""
    sign.unlink(missing_ok=True)
    tail.clear()
    hung = ""
    child: Any = subprocess.Popen(
        list(command),
        stderr=subprocess.PIPE,
        env={**os.environ, ALIVE: str(sign)},
        start_new_session=True,  # so that all that it starts can be ended with it
        errors="replace",
        text=True,
    )
    current.append(child)
    if asked:  # while it was being started
        child.send_signal(asked[-1])
    reader = threading.Thread(target=pass_on, args=(child.stderr, tail), daemon=True)
    reader.start()
    try:
        watch = Watch(child.pid, sign, least)
        while child.poll() is None:
            time.sleep(LOOK)
            if child.poll() is None and watch.hangs():
                hung = f"hung for {watch.silence:.0f} s and was ended"
                show_stacks(child)
                break
    finally:
        current.clear()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        reader.join(STACKS)
    return code, hung


class Watch:
    """Looks whether a child gets on."""

    def __init__(self, pid: int, sign: Path, least: float) -> None:
        """From now on."""
        self.pid, self.sign, self.least = pid, sign, least
        self.seen, self.at, self.work = 0, time.monotonic(), cpu_seconds(pid)
        self.silence = 0.0

    def hangs(self) -> bool:
        """Whether it has been silent for longer than can be right."""
        now = time.monotonic()
        with contextlib.suppress(OSError):
            seen = self.sign.stat().st_mtime_ns
            if seen != self.seen:
                self.seen, self.at, self.work = seen, now, cpu_seconds(self.pid)
        self.silence = now - self.at
        idle, busy = self.allowed()
        worked = cpu_seconds(self.pid) - self.work
        if self.silence > max(self.least, busy):
            return True
        return self.silence > max(self.least, idle) and worked < IDLE * self.silence

    def allowed(self) -> tuple[float, float]:
        """Seconds of silence that are right while it does nothing, or computes."""
        try:
            idle, busy = map(float, self.sign.read_text().split())
        except (OSError, ValueError):
            return 0.0, math.inf  # it reads its data, which takes as long as it does
        return idle, busy


def cpu_seconds(pid: int) -> float:
    """Seconds that a process has computed; 0 where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show_stacks(child: Any) -> None:
    """Lets a child that hangs write where it is, in all of its threads."""
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGUSR1)
        os.killpg(child.pid, signal.SIGCONT)  # where it was stopped
    end = time.monotonic() + STACKS
    while child.poll() is None and time.monotonic() < end:
        time.sleep(LOOK)


@contextlib.contextmanager
def heard(asked: list[int], current: list[Any]) -> Iterator[None]:
    """Signals that ask to stop are noted, and go on to the child of the moment."""

    def on(number: int, _: Any) -> None:
        asked.append(number)
        for child in current:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slept(seconds: float, asked: list[int]) -> bool:
    """Whether nobody asked to stop in the meantime."""
    end = time.monotonic() + seconds
    while not asked and time.monotonic() < end:
        time.sleep(min(LOOK, seconds))
    return not asked


def pass_on(lines: Any, tail: deque[str]) -> None:
    """Shows what a child writes to stderr, and remembers the end of it."""
    with lines:
        for line in lines:
            sys.stderr.write(line)
            sys.stderr.flush()
            tail.append(line.rstrip("\n"))


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    step = 0
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_bytes()[-(1 << 16) :].splitlines()
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                event = json.loads(line)
                step = int(event["step"]) if event["event"] == "train" else step
    return step


def manner(code: int) -> str:
    """What happened to a process, by its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"died of {signal.Signals(-code).name}"


def be_supervised() -> None:
    """In the child: it can be asked for its stacks, and does not outlive its parent."""
    if ALIVE not in os.environ:
        return
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == 1:  # it is gone already
            os._exit(1)
