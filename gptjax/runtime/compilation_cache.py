"""Persistent compilation cache, protected against foreign entries.

Uses JAX's persistent compilation cache, enabled by the command line only. A compiled
program is code, and JAX runs every entry it finds. Therefore each entry NAME-cache
needs a NAME-seal: an HMAC under a key in the user's home, which is in no run folder.
Entries without a valid seal (corrupt, or copied from elsewhere) are deleted and
recompiled.
"""

import contextlib
import hmac
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.fileio.download import user_cache_dir
from gptjax.runtime.timing import COMPILE_EVENT, listen_to_jax_events

CACHE_DIR = "compiled"  # inside a run folder or the user's cache
MAX_CACHE_BYTES = 1 << 28  # per folder; the oldest entries are evicted
SEAL_KEY_BYTES = 32
ENTRY_SUFFIX, SEAL_SUFFIX = "-cache", "-seal"  # file suffixes; the first one is JAX's


def cache_dir_for(model: str) -> Path:
    """Cache folder for MODEL: in its run folder, else in the user's cache."""
    is_run = (Path(model) / "model" / "config.json").is_file()
    return Path(model) / CACHE_DIR if is_run else user_cache_dir(CACHE_DIR)


@contextlib.contextmanager
def persistent_cache(cache_dir: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Caches compiled programs in a folder while the block runs.

    Does nothing if the user has configured or disabled JAX's cache. If the folder is
    not writable, programs are not cached and the reason is logged.
    """
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        yield
        return
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        key = read_seal_key(user_cache_dir("programs.key"))
        evict_invalid(cache_dir, key)
    except OSError as error:
        log(f"compiled programs are not cached in {cache_dir}: {error}")
        yield
        return

    def on_jax_event(event: str, seconds: float) -> None:
        if event == COMPILE_EVENT and jax.process_index() == 0:  # only process 0 writes
            with contextlib.suppress(OSError):
                write_seals(cache_dir, key)

    with enable_cache(cache_dir), listen_to_jax_events(on_jax_event), warnings.catch_warnings():
        # An entry truncated by another process or a full disk: JAX recompiles.
        message = "Error (reading|writing) persistent compilation cache"
        warnings.filterwarnings("ignore", message)
        yield


@contextlib.contextmanager
def enable_cache(cache_dir: Path) -> Iterator[None]:
    """Enables JAX's cache in the folder, for programs of any size."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(cache_dir),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # files without a seal
    }
    previous = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()  # JAX may have cached that it is off
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in previous.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def read_seal_key(path: Path) -> bytes:
    """Reads the user's key; creates it at first use.

    Raises:
        OSError: the key can be neither read nor created.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                file.write(secrets.token_bytes(SEAL_KEY_BYTES))
    key = path.read_bytes()
    if len(key) != SEAL_KEY_BYTES:
        raise OSError(f"{path} has {len(key)} bytes instead of {SEAL_KEY_BYTES}; delete it")
    return key


def compute_seal(path: Path, key: bytes) -> bytes:
    """Computes the seal of a cache entry from its name and content."""
    return hmac.digest(key, path.name.encode() + b"\0" + path.read_bytes(), "sha256")


def write_seals(cache_dir: Path, key: bytes) -> None:
    """Writes the seals of entries that have none."""
    for path in cache_dir.glob(f"*{ENTRY_SUFFIX}"):
        seal_file = seal_path(path)
        if not seal_file.exists():
            seal_file.write_bytes(compute_seal(path, key))


def seal_path(path: Path) -> Path:
    """Path of the seal of a cache entry."""
    return path.with_name(path.name.removesuffix(ENTRY_SUFFIX) + SEAL_SUFFIX)


def evict_invalid(cache_dir: Path, key: bytes) -> None:
    """Deletes entries with an invalid seal and the oldest above the size limit."""
    free_bytes = MAX_CACHE_BYTES
    for path in sorted(cache_dir.glob(f"*{ENTRY_SUFFIX}"), key=modified_time, reverse=True):
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            seal_file = seal_path(path)
            free_bytes -= path.stat().st_size
            stored_seal = seal_file.read_bytes() if seal_file.exists() else b""
            if free_bytes < 0 or not hmac.compare_digest(stored_seal, compute_seal(path, key)):
                path.unlink()
                seal_file.unlink(missing_ok=True)


def modified_time(path: Path) -> float:
    """Modification time of a file; 0 if it is gone."""
    return path.stat().st_mtime if path.exists() else 0.0
