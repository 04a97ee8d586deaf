"""Compiled programs in files, so that the same command need not compile again.

The files are those of JAX's own cache; the command line switches it on, importing the
library does not. A program is code, and JAX runs whatever it finds. So each file
NAME-cache needs a NAME-seal beside it: a hash under a key that lies in the user's home
and in no run folder. What is damaged, or came with a folder from elsewhere, has none
that fits: it is removed, and compiled anew.
"""

import contextlib
import hmac
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.download import cache_folder
from gptjax.phases import COMPILED, hearing

FOLDER = "compiled"  # in a run folder, or in the user's cache
MOST_BYTES = 1 << 28  # of one folder; the oldest go first
KEY_BYTES = 32
PROGRAM, SEAL = "-cache", "-seal"  # endings; the first one is JAX's


def folder_of(model: str) -> Path:
    """Where the programs for MODEL are: in its run folder, else in the user's cache."""
    is_run = (Path(model) / "model" / "config.json").is_file()
    return Path(model) / FOLDER if is_run else cache_folder(FOLDER)


@contextlib.contextmanager
def kept(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """What is compiled in the block is kept in the folder, or comes from there.

    Where the user has named a folder to JAX, or has switched its cache off, nothing
    is changed. A folder that cannot be written is no error.

    Args:
        folder: made if it is not there.
        say: gets why nothing is kept.
    """
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = read_key(cache_folder("programs.key"))
        discard(folder, key)
    except OSError as error:
        say(f"programs are not kept in {folder}: {error}")
        yield
        return

    def heard(event: str, seconds: float) -> None:
        if event == COMPILED and jax.process_index() == 0:  # only it writes
            with contextlib.suppress(OSError):
                seal(folder, key)

    with cache_at(folder), hearing(heard), warnings.catch_warnings():
        # A file cut short by another process, a full disk: then it is compiled.
        message = "Error (reading|writing) persistent compilation cache"
        warnings.filterwarnings("ignore", message)
        yield


@contextlib.contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """JAX's cache is the folder, for programs of any size."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # its files have no seal
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    compilation_cache.reset_cache()  # it has perhaps been found to be off
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def read_key(path: Path) -> bytes:
    """The user's key, made at first use.

    Raises:
        OSError: it can neither be read nor made.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise OSError(f"{path} has {len(key)} bytes, not {KEY_BYTES}; remove it")
    return key


def sealed(path: Path, key: bytes) -> bytes:
    """The seal that the file of a program has to have; its name belongs to it."""
    return hmac.digest(key, path.name.encode() + b"\0" + path.read_bytes(), "sha256")


def seal(folder: Path, key: bytes) -> None:
    """Seals the programs that have no seal yet."""
    for path in folder.glob(f"*{PROGRAM}"):
        beside = seal_of(path)
        if not beside.exists():
            beside.write_bytes(sealed(path, key))


def seal_of(path: Path) -> Path:
    """The file of the seal."""
    return path.with_name(path.name.removesuffix(PROGRAM) + SEAL)


def discard(folder: Path, key: bytes) -> None:
    """Removes programs whose seal does not fit, and the oldest of too many."""
    room = MOST_BYTES
    for path in sorted(folder.glob(f"*{PROGRAM}"), key=written, reverse=True):
        with contextlib.suppress(FileNotFoundError):  # another process is as tidy
            beside = seal_of(path)
            room -= path.stat().st_size
            found = beside.read_bytes() if beside.exists() else b""
            if room < 0 or not hmac.compare_digest(found, sealed(path, key)):
                path.unlink()
                beside.unlink(missing_ok=True)


def written(path: Path) -> float:
    """When the file was written; at no time, if it is gone."""
    return path.stat().st_mtime if path.exists() else 0.0
