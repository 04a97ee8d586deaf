"""JAX's persistent compilation cache, in a directory that only the user can write to.

JAX runs every program that it finds in the cache.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.fileio.download import user_cache_dir

MAX_CACHE_BYTES = 1 << 30  # the least recently used programs are evicted


@contextlib.contextmanager
def persistent_cache() -> Iterator[None]:
    """Caches compiled programs, unless the user has configured JAX's cache."""
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        yield
        return
    cache_dir = user_cache_dir("xla")
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache_dir.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"other users can write to {cache_dir}; chmod 700 it")
    except OSError as error:
        logging.getLogger(__name__).warning("compiled programs are not cached: %s", error)
        yield
        return
    with enable_cache(cache_dir, MAX_CACHE_BYTES):
        yield


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
