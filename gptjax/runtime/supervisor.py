"""Supervisor (`--auto-restart`): restarts a training process after a crash or hang.

It imports no heavy package. The child reports its step in the heartbeat file, see
`gptjax.runtime.preemption.heartbeat`.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.runtime.preemption import EXIT_PREEMPTED, HEARTBEAT_ENV, on_stop_signals
from gptjax.runtime.terminal import print_message

HANG_TIMEOUT_SECONDS = 1800.0  # default; compiling and saving send no heartbeats
FINAL_EXIT_CODES = (0, 2, EXIT_PREEMPTED)  # no restart after these
RESTART_WAITS_SECONDS = (1.0, 30.0)  # after the first failures at one step; then give up
POLL_INTERVAL_SECONDS = 0.2  # between polls of the child
STACK_DUMP_SECONDS = 2.0  # for a child to dump its stacks
PR_SET_PDEATHSIG = 1  # prctl option: signal sent when the parent dies


def supervise(command: Sequence[str], hang_timeout: float = HANG_TIMEOUT_SECONDS) -> int:
    """Runs a training command, restarting it after failures; logs to stderr.

    Returns its exit code if it is 0, 2 or 75, or 1 after three failures at one step.
    """
    failed_step, num_failures = -1, 0
    received: list[int] = []
    children: list[Any] = []

    def log(text: str) -> None:
        print_message(f"auto-restart: {text}")

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for child in children[-1:]:
            child.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="gptjax-") as scratch_dir, on_stop_signals(forward):
        heartbeat_path = Path(scratch_dir) / "heartbeat"
        heartbeat_path.write_text("0")
        environment = {**os.environ, HEARTBEAT_ENV: str(heartbeat_path)}
        while True:
            # A session of its own, to kill its children too.
            child = subprocess.Popen(list(command), env=environment, start_new_session=True)
            children.append(child)
            if received:  # during the start
                child.send_signal(received[-1])
            is_hung = wait_or_kill(child, heartbeat_path, hang_timeout)
            exit_code = child.returncode
            if exit_code in FINAL_EXIT_CODES and not is_hung:
                return exit_code
            if received:
                return exit_code if exit_code > 0 else 128 - exit_code
            step = int(heartbeat_path.read_text())
            num_failures, failed_step = num_failures * (step == failed_step) + 1, step
            reason = f"exited with code {exit_code}"
            if is_hung:
                reason = f"hung for {hang_timeout:g} s and was killed"
            elif exit_code < 0:
                reason = f"was killed by {signal.Signals(-exit_code).name}"
            if num_failures > len(RESTART_WAITS_SECONDS):
                log(f"the run {reason}: failure {num_failures} after step {step}; giving up")
                return 1
            seconds = RESTART_WAITS_SECONDS[num_failures - 1]
            log(f"the run {reason} after step {step}; restarting in {seconds:g} s")
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if received:
                    return EXIT_PREEMPTED
                time.sleep(min(POLL_INTERVAL_SECONDS, seconds))


def wait_or_kill(child: Any, heartbeat_path: Path, hang_timeout: float) -> bool:
    """Waits for the end of a child, or kills it; returns True if it hung."""
    last_heartbeat, heard_at, is_hung = 0, time.monotonic(), False
    while child.poll() is None and not is_hung:
        time.sleep(POLL_INTERVAL_SECONDS)
        modified = heartbeat_path.stat().st_mtime_ns
        if modified != last_heartbeat:
            last_heartbeat, heard_at = modified, time.monotonic()
        is_hung = time.monotonic() - heard_at > hang_timeout
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of its session is left
        if is_hung:
            child.send_signal(signal.SIGUSR1)  # dumps its stacks, see `init_child`
            os.killpg(child.pid, signal.SIGCONT)  # in case it was stopped
            time.sleep(STACK_DUMP_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return is_hung


def init_child() -> None:
    """In the child: enables stack dumps and exit at the parent's death."""
    if HEARTBEAT_ENV not in os.environ:
        return
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
