"""Lock of a run folder: one writer at a time.

The kernel releases the lock when its process ends, for whatever reason.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gptjax.errors import ModelError

RUN_LOCK_FILE = ".lock"
# Raised by network file systems without locks.
UNSUPPORTED_LOCK_ERRNOS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Locks the run folder while the block runs.

    Has no effect on file systems without locks.

    Raises:
        ModelError: another process holds the lock, or the folder is not writable.
    """
    path = run_dir / RUN_LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror}. Choose another folder with --run DIR."
        ) from error
    try:
        _acquire_lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _acquire_lock(descriptor: int, path: Path) -> None:
    """Acquires the lock and writes its owner to the file.

    Raises:
        ModelError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ModelError(
            f"another process trains in {path.parent}: {_lock_owner(descriptor)}. Wait "
            "for it, stop it, or choose another folder with --run DIR."
        ) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED_LOCK_ERRNOS:
            raise
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    about = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _lock_owner(descriptor: int) -> str:
    """Describes the lock owner from the content of the file."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {about['pid']} on {about['host']}, started {about['started']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "owner not yet recorded"
