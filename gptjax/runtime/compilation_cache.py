"""JAX's persistent compilation cache, in a directory that only the user can access.

JAX runs every program that it finds in the cache.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import ConfigError
from gptjax.fileio.paths import user_cache_dir

MAX_CACHE_BYTES = 1 << 30  # the least recently used programs are evicted


@contextlib.contextmanager
def persistent_cache() -> Iterator[None]:
    """Caches compiled programs, unless the user has configured JAX's cache."""
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        yield
        return
    try:
        cache_dir = user_cache_dir("xla")
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache_dir = cache_dir.resolve()  # links are not followed again
        check_private(cache_dir)
    except (OSError, ConfigError) as error:
        logging.getLogger(__name__).warning("compiled programs are not cached: %s", error)
        yield
        return
    with enable_cache(cache_dir, MAX_CACHE_BYTES):
        yield


def check_private(folder: Path) -> None:
    """Raises PermissionError if another user can write to a folder, or replace it."""
    if folder.stat().st_mode & 0o077:
        raise PermissionError(f"other users can access {folder}; chmod 700 it")
    for path in (folder, *folder.parents):
        status = path.stat()
        is_writable = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (os.getuid(), 0) or is_writable:
            raise PermissionError(f"other users can write to {path}")
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")


@contextlib.contextmanager
def enable_cache(cache_dir: Path, max_bytes: int = -1) -> Iterator[None]:
    """Enables JAX's cache in the directory, for programs of any size."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(cache_dir),
        "jax_compilation_cache_max_size": max_bytes,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    previous = {name: getattr(jax.config, name) for name in settings}

    def apply(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX may have cached that it is off

    apply(settings)
    try:
        yield
    finally:
        apply(previous)
