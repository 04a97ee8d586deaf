"""Supervisor: restarts a training process after a crash or hang.

It imports no heavy package and has no state that needs saving. The child writes its
hang timeouts to the heartbeat file (`gptjax.runtime.preemption.heartbeat`).
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

from gptjax.runtime.preemption import EXIT_PREEMPTED, HEARTBEAT_ENV, STOP_SIGNALS

FINAL_EXIT_CODES = (0, 2, EXIT_PREEMPTED)  # no restart after these exit codes
MIN_HANG_SECONDS = 60.0  # minimum hang timeout
MAX_FAILURES = 3  # consecutive failures at one step before giving up
MIN_RESTART_WAIT_SECONDS = 1.0  # first wait before a restart; doubles each time
MAX_RESTART_WAIT_SECONDS = 300.0
MIN_CPU_FRACTION = 0.001  # CPU time per wall time below which a process is idle
STDERR_TAIL_LINES = 20  # lines of stderr shown after the last failure
POLL_INTERVAL_SECONDS = 0.2  # between polls of the child
STACK_DUMP_SECONDS = 2.0  # for a child to dump its stacks
PR_SET_PDEATHSIG = 1  # prctl option: signal sent when the parent dies


class Failure(NamedTuple):
    """Exit reason of a child and the last step it logged."""

    step: int
    reason: str


def supervise(
    command: Sequence[str],
    run_dir: Path,
    min_hang_seconds: float = MIN_HANG_SECONDS,
    log: Callable[[str], None] | None = None,
) -> int:
    """Runs a training command, restarting it after failures.

    Log lines go to stderr by default.

    Returns:
        The exit code of the command if it is 0, 2 or 75; 1 after three failures at the
        same step.
    """
    log = log or (lambda text: print(f"supervise: {text}", file=sys.stderr, flush=True))
    stderr_tail: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
    received_signals: list[int] = []
    last_failure, num_failures, wait_seconds = None, 0, MIN_RESTART_WAIT_SECONDS
    running: list[Any] = []  # the running child, if any
    with (
        tempfile.TemporaryDirectory(prefix="gptjax-") as scratch_dir,
        forward_signals(received_signals, running),
    ):
        heartbeat_path = Path(scratch_dir) / "alive"
        while True:
            exit_code, hang_reason = run_child(
                command, heartbeat_path, min_hang_seconds, received_signals, running, stderr_tail
            )
            if exit_code in FINAL_EXIT_CODES and not hang_reason:
                return exit_code
            if received_signals:
                return exit_code if exit_code > 0 else 128 - exit_code
            reason = hang_reason or describe_exit(exit_code)
            failure = Failure(last_logged_step(run_dir), reason)
            if last_failure is None or failure.step != last_failure.step:
                num_failures, wait_seconds = 0, MIN_RESTART_WAIT_SECONDS / 2
            num_failures, wait_seconds = num_failures + 1, wait_seconds * 2
            if num_failures >= MAX_FAILURES:
                log(
                    f"the run {failure.reason} {num_failures} times after step "
                    f"{failure.step} without progress; giving up. Its last lines:"
                )
                for line in stderr_tail:
                    print(line, file=sys.stderr)
                return 1
            wait_seconds = min(wait_seconds, MAX_RESTART_WAIT_SECONDS)
            log(
                f"the run {failure.reason} after step {failure.step}; restarting in "
                f"{wait_seconds:g} s"
            )
            last_failure = failure
            if not interruptible_sleep(wait_seconds, received_signals):
                return EXIT_PREEMPTED


def run_child(
    command: Sequence[str],
    heartbeat_path: Path,
    min_hang_seconds: float,
    received_signals: list[int],
    running: list[Any],
    stderr_tail: deque[str],
) -> tuple[int, str]:
    """Runs the command once; returns its exit code and, if it hung, the reason."""
    heartbeat_path.unlink(missing_ok=True)
    stderr_tail.clear()
    hang_reason = ""
    child: Any = subprocess.Popen(
        list(command),
        stderr=subprocess.PIPE,
        env={**os.environ, HEARTBEAT_ENV: str(heartbeat_path)},
        start_new_session=True,  # a process group, to kill its children too
        errors="replace",
        text=True,
    )
    running.append(child)
    if received_signals:  # received during the start
        child.send_signal(received_signals[-1])
    reader = threading.Thread(target=tee_stderr, args=(child.stderr, stderr_tail), daemon=True)
    reader.start()
    try:
        detector = HangDetector(child.pid, heartbeat_path, min_hang_seconds)
        while child.poll() is None:
            time.sleep(POLL_INTERVAL_SECONDS)
            if child.poll() is None and detector.is_hung():
                hang_reason = f"hung for {detector.silent_seconds:.0f} s and was killed"
                dump_stacks(child)
                break
    finally:
        running.clear()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        exit_code = child.wait()
        reader.join(STACK_DUMP_SECONDS)
    return exit_code, hang_reason


class HangDetector:
    """Detects a child without heartbeat or progress."""

    def __init__(self, pid: int, heartbeat_path: Path, min_hang_seconds: float) -> None:
        """Starts watching."""
        self.pid = pid
        self.heartbeat_path = heartbeat_path
        self.min_hang_seconds = min_hang_seconds
        self.seen = 0
        self.heartbeat_time = time.monotonic()
        self.heartbeat_cpu_seconds = process_cpu_seconds(pid)
        self.silent_seconds = 0.0

    def is_hung(self) -> bool:
        """True if the last heartbeat is older than the timeout."""
        now = time.monotonic()
        with contextlib.suppress(OSError):
            heartbeat_mtime = self.heartbeat_path.stat().st_mtime_ns
            if heartbeat_mtime != self.seen:
                self.seen = heartbeat_mtime
                self.heartbeat_time = now
                self.heartbeat_cpu_seconds = process_cpu_seconds(self.pid)
        self.silent_seconds = now - self.heartbeat_time
        idle_timeout, busy_timeout = self.timeouts()
        cpu_used = process_cpu_seconds(self.pid) - self.heartbeat_cpu_seconds
        if self.silent_seconds > max(self.min_hang_seconds, busy_timeout):
            return True
        return (
            self.silent_seconds > max(self.min_hang_seconds, idle_timeout)
            and cpu_used < MIN_CPU_FRACTION * self.silent_seconds
        )

    def timeouts(self) -> tuple[float, float]:
        """Timeouts (s) while the child is idle and while it computes."""
        try:
            idle_timeout, busy_timeout = map(float, self.heartbeat_path.read_text().split())
        except (OSError, ValueError):
            return 0.0, math.inf  # no heartbeat yet: it is loading data
        return idle_timeout, busy_timeout


def process_cpu_seconds(pid: int) -> float:
    """CPU time of a process in seconds; 0 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def dump_stacks(child: Any) -> None:
    """Makes a hung child dump the stacks of all its threads."""
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGUSR1)
        os.killpg(child.pid, signal.SIGCONT)  # in case it was stopped
    end = time.monotonic() + STACK_DUMP_SECONDS
    while child.poll() is None and time.monotonic() < end:
        time.sleep(POLL_INTERVAL_SECONDS)


@contextlib.contextmanager
def forward_signals(received_signals: list[int], running: list[Any]) -> Iterator[None]:
    """Records stop signals and forwards them to the running child."""

    def on_signal(number: int, _: Any) -> None:
        received_signals.append(number)
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    previous_handlers = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def interruptible_sleep(seconds: float, received_signals: list[int]) -> bool:
    """Sleeps; returns False if a signal arrived."""
    end = time.monotonic() + seconds
    while not received_signals and time.monotonic() < end:
        time.sleep(min(POLL_INTERVAL_SECONDS, seconds))
    return not received_signals


def tee_stderr(lines: Any, stderr_tail: deque[str]) -> None:
    """Copies a child's stderr to ours and keeps its last lines."""
    with lines:
        for line in lines:
            sys.stderr.write(line)
            sys.stderr.flush()
            stderr_tail.append(line.rstrip("\n"))


def last_logged_step(run_dir: Path) -> int:
    """Last training step in metrics.jsonl; 0 if there is none."""
    step = 0
    with contextlib.suppress(OSError):
        lines = (run_dir / "metrics.jsonl").read_bytes()[-(1 << 16) :].splitlines()
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                event = json.loads(line)
                step = int(event["step"]) if event["event"] == "train" else step
    return step


def describe_exit(exit_code: int) -> str:
    """Describes how a process ended, given its exit code."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"


def init_child() -> None:
    """In the child: enables stack dumps and exit at the parent's death."""
    if HEARTBEAT_ENV not in os.environ:
        return
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # the parent is already dead
            os._exit(1)
