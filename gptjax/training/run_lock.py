"""Lock of a run folder: one writer at a time.

The kernel releases the lock when its process ends, for whatever reason.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from gptjax.errors import ModelError

RUN_LOCK_FILE = ".lock"
LOCK_OWNER_FILE = ".lock-owner"


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Locks the run folder while the block runs.

    Raises:
        ModelError: another process holds the lock, or the folder is not writable.
    """
    lock = filelock.FileLock(run_dir / RUN_LOCK_FILE, timeout=0)
    owner_path = run_dir / LOCK_OWNER_FILE
    try:
        lock.acquire()
        owner_path.unlink(missing_ok=True)
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with owner_path.open("x") as file:
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, started {started}")
    except filelock.Timeout as error:
        owner = owner_path.read_text(errors="replace") if owner_path.is_file() else ""
        raise ModelError(
            f"another process trains in {run_dir}: {owner or 'owner not recorded'}. Wait "
            "for it, stop it, or choose another folder with --run DIR."
        ) from error
    except OSError as error:
        raise ModelError(
            f"cannot write {run_dir}: {error.strerror}. Choose another folder with --run DIR."
        ) from error
    try:
        yield
    finally:
        lock.release()
