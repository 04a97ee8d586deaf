"""Follower process of a training run: started, watched and stopped by the training.

A process of its own can neither slow nor stop the training: it only reads the files of
the run, has a lower priority, and is killed if it does not end.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.runtime.terminal import logger

FINISH_SECONDS = 15.0  # for the follower to send the rest when training ends


def follower_command(run_dir: Path, tracker: str) -> list[str]:
    """Command of the follower process."""
    return [sys.executable, "-P", "-m", "gptjax.tracking", str(run_dir), tracker]


@contextlib.contextmanager
def track_run(run_dir: Path, tracker: str) -> Iterator[None]:
    """Sends a run to a tracker while the block trains it; a failure is logged once."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        process = subprocess.Popen(
            follower_command(run_dir, tracker),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the training
        )
    except OSError as error:
        log_failure(run_dir, tracker, f"{tracker} cannot start: {error.strerror}")
        yield
        return
    is_late = threading.Event()
    watcher = threading.Thread(
        target=watch_follower, args=(process, run_dir, tracker, is_late), daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        stop_follower(process, watcher, is_late)


def watch_follower(process: Any, run_dir: Path, tracker: str, is_late: threading.Event) -> None:
    """Waits for the end of the follower; logs why it failed, if it did."""
    last_line = ""
    with process.stderr:
        for line in process.stderr:
            last_line = line.decode(errors="replace").strip() or last_line
    if is_late.is_set():
        reason = f"{tracker} did not finish within {FINISH_SECONDS:g} s after training"
        log_failure(run_dir, tracker, reason)
    elif exit_code := process.wait():
        log_failure(run_dir, tracker, last_line or f"{tracker}: exit code {exit_code}")


def log_failure(run_dir: Path, tracker: str, reason: str) -> None:
    """Logs why a tracker lacks a part of the run."""
    logger.warning(
        f"tracker  {reason}. The training is not affected. Send the rest with `gptjax track "
        f"{shlex.quote(str(run_dir))} --to {tracker}`"
    )


def stop_follower(process: Any, watcher: threading.Thread, is_late: threading.Event) -> None:
    """Lets the follower send the rest, or kills it with its children."""
    process.stdin.close()
    watcher.join(FINISH_SECONDS)
    if process.poll() is None:
        is_late.set()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    watcher.join(1.0)
    process.wait()
