"""Atomic writes: a file or folder is complete, or unchanged after a failure."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gptjax.errors import DataError, GptjaxError


@contextlib.contextmanager
def atomic_path(path: Path, *, replace_folder: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the file or folder created there then becomes `path`.

    An existing file is replaced; a folder that is not empty only if `replace_folder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gptjax-") as temp_dir:
        new, old = Path(temp_dir, "new"), Path(temp_dir, "old")
        yield new
        for file in [*new.rglob("*"), new]:
            fsync(file)
        if replace_folder and path.is_dir():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    fsync(path.parent)


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


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as new:
        new.write_text(text, encoding="utf-8")


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
