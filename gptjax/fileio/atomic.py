"""Atomic writes: a file or folder is complete, or unchanged after a failure.

New content is written into a hidden folder beside its path, then renamed. A link at the
path is replaced, not followed. A path has one writer at a time, so that a writer may
remove what a killed one left.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from gptjax.errors import DataError, GptjaxError

# Network file systems may have no locks: Lustre and NFS with some options.
UNSUPPORTED_LOCK_ERRNOS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def atomic_path(path: Path, *, replace_folder: bool = False, wait: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the file or folder created there then becomes `path`.

    An existing file is replaced; a folder that is not empty only if `replace_folder`.
    Without a file or folder at the temporary path, nothing changes. While another
    process writes `path`, this raises a DataError, or `wait`s. A device, a pipe or a
    link to one, such as /dev/stdout, is a DataError. An OSError names `path`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is a device or a pipe. Choose the name of a new file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".gptjax-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"
    lock = write_lock(path.parent / f"{prefix}lock", path, wait)
    with name_target(path, prefix), lock as is_locked:
        for leftover in path.parent.glob(f"{prefix}????????") if is_locked else ():
            remove_leftover(leftover, path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as temp_dir:
            new, old = Path(temp_dir, "new"), Path(temp_dir, "old")
            yield new
            if not new.exists():
                return
            for file in [*new.rglob("*"), new]:
                if not file.is_symlink():
                    fsync(file)
            if path.is_symlink() or (replace_folder and path.is_dir()):
                os.replace(path, old)
            try:
                os.replace(new, path)
            except BaseException:
                if os.path.lexists(old):
                    os.replace(old, path)
                raise
            fsync(path.parent)


@contextlib.contextmanager
def name_target(path: Path, prefix: str) -> Iterator[None]:
    """Names `path`, or a file in it, in an OSError about a temporary path."""
    try:
        yield
    except OSError as error:
        if prefix in f"{error.filename} {error.filename2}":
            temporary = Path(str(error.filename).partition(prefix)[2])  # ????????/new/...
            error.filename = str(path.joinpath(*temporary.parts[2:]))
            del error.filename2
        raise


@contextlib.contextmanager
def write_lock(lock_path: Path, path: Path, wait: bool) -> Iterator[bool]:
    """Locks a path for writing; yields False if its file system has no locks.

    The lock file is removed at the end; the kernel unlocks that of a killed process.
    """
    while True:
        with open_append(lock_path) as file:
            try:
                is_locked = lock_file(file.fileno())
            except BlockingIOError as error:
                if not wait:
                    raise DataError(
                        f"another process is writing {path}. Wait for it, or choose another name."
                    ) from error
                logging.getLogger("gptjax").info(f"waiting  for the process that is writing {path}")
                is_locked = lock_file(file.fileno(), wait=True)
            if os.fstat(file.fileno()).st_nlink:  # else its last owner has removed it
                try:
                    yield is_locked
                finally:
                    lock_path.unlink(missing_ok=True)
                return


def lock_file(descriptor: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Locks an open file; returns False if its file system has no locks.

    A `shared` lock excludes only others that are not. BlockingIOError: another process
    has locked it.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, mode | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in UNSUPPORTED_LOCK_ERRNOS:
            raise
        return False
    return True


def remove_leftover(temp_dir: Path, path: Path) -> None:
    """Removes the temporary folder of a killed writer of `path`.

    If it was killed between two renames, the previous content is moved back.
    """
    with contextlib.suppress(OSError):  # it may belong to another user
        if not os.path.lexists(path) and (temp_dir / "old").exists():
            os.replace(temp_dir / "old", path)
        remove_path(temp_dir)


def remove_path(path: Path) -> None:
    """Deletes a folder, file or link if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[TextIO]:
    """Opens a text file for writing; it appears at `path` when the block succeeds."""
    try:
        # Only JSON strings may contain lone surrogates, which UTF-8 cannot encode;
        # their backslash escapes are valid JSON.
        with (
            atomic_path(path) as new,
            new.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            yield file
    except GptjaxError:  # of the block
        raise
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error}. Check the permissions and free space of its folder."
        ) from error


def write_jsonl(
    path: Path, rows: Iterable[Any], default: Callable[[Any], Any] | None = None
) -> None:
    """Writes rows as JSON lines; `default` converts values that are not of JSON."""
    with open_atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=default) + "\n")


def write_atomic(path: Path, text: str, max_bytes: int | None = None) -> None:
    """Writes a text file atomically; `max_bytes` is the limit of its reader."""
    data = text.encode()
    if max_bytes is not None and len(data) > max_bytes:
        raise DataError(
            f"{path} would have {len(data):,} bytes, more than the {max_bytes:,} that can be "
            "read again. Use fewer or shorter names and values."
        )
    with atomic_path(path) as new:
        new.write_bytes(data)


def open_append(path: Path) -> TextIO:
    """Opens a text file for appending; OSError if it is a link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "a", encoding="utf-8", opener=opener)


def fsync(path: Path) -> None:
    """Flushes a file or folder to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some cannot flush folders
            raise
    finally:
        os.close(descriptor)
