"""Lock of a run folder: one writer at a time.

The kernel releases the lock when its process ends, for whatever reason.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gptjax.errors import ModelError

RUN_LOCK_FILE = ".lock"
# Network file systems may have no locks: Lustre and NFS with some options.
UNSUPPORTED_LOCK_ERRNOS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Locks the run folder while the block runs, if its file system has locks."""
    path = run_dir / RUN_LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror}. Choose another folder with --run DIR."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace")
            raise ModelError(
                f"another process trains in {run_dir}: {owner or 'owner not recorded'}. Wait "
                "for it, stop it, or choose another folder with --run DIR."
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED_LOCK_ERRNOS:
                raise
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        os.ftruncate(descriptor, 0)
        owner = f"pid {os.getpid()} on {socket.gethostname()}, started {started}"
        os.pwrite(descriptor, owner.encode(), 0)
        yield
    finally:
        os.close(descriptor)
