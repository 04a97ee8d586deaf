"""One writer in a run folder: the second one is told of the first.

The kernel gives the lock back when its process ends, however that happens.
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

LOCK = ".lock"
NOT_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Has the run folder for itself until the end of the `with`.

    Where the file system knows no locks, nobody is kept out.

    Raises:
        ModelError: another process has it; or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror}. Name another folder with --run "
            "DIR."
        ) from error
    try:
        lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Takes the lock and writes who has it.

    Raises:
        ModelError: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ModelError(
            f"another process trains in {path.parent}: {holder(descriptor)}. Wait for "
            "it, end it, or name another folder with --run DIR."
        ) from error
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    about = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def holder(descriptor: int) -> str:
    """Who has the lock, as far as the file says."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {about['pid']} on {about['host']}, started {about['started']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "it has not yet said which"
