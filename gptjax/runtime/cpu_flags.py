"""XLA and malloc settings for faster CPU runs (`--fast-cpu`), set before JAX starts."""

import ctypes
import os
import sys

FAST_CPU_XLA_FLAGS = (
    "--xla_cpu_prefer_vector_width=512",  # AVX-512 if available
    # Keeps optimization barriers until after fusion, so that shared inputs are computed
    # once, see `gptjax.model.layers.LayerNorm`.
    "--xla_disable_hlo_passes=cse_barrier_expander",
)
# Parameters and values of glibc's mallopt.
MALLOPT_SETTINGS = {
    -1: -1,  # M_TRIM_THRESHOLD: never return memory to the system
    -4: 0,  # M_MMAP_MAX: no separate mappings for large arrays
    -8: 1,  # M_ARENA_MAX: a single heap
}


def enable_fast_cpu() -> None:
    """Sets XLA's CPU flags and calls `disable_malloc_trim`."""
    add_xla_flags(*FAST_CPU_XLA_FLAGS)
    disable_malloc_trim()


def add_xla_flags(*flags: str) -> None:
    """Adds XLA flags for this process and its children."""
    existing = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*existing, *(f for f in flags if f not in existing)])


def disable_malloc_trim() -> None:
    """Keeps freed memory in the process (glibc only).

    A train step of a 124M model frees and allocates 2 GB, page by page. This takes a
    quarter of a second, or several on a virtual machine that reclaims free pages.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for parameter, value in MALLOPT_SETTINGS.items():
            library.mallopt(parameter, value)
