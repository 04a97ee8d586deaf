"""What makes training and writing on a CPU faster, if it is set before JAX starts.

The library never does it by itself: `gptjax ... --fast-cpu` does, or a program's first
lines, `from gptjax.cpu import fast_cpu; fast_cpu()`.
"""

import ctypes
import os
import sys

FLAGS = (
    "--xla_cpu_prefer_vector_width=512",  # AVX-512, where there is such a unit
    # Barriers stay until operations are fused, so that what several of them read is
    # computed once: see `gptjax.layers.Norm`.
    "--xla_disable_hlo_passes=cse_barrier_expander",
)
# Parameters of glibc's mallopt, and "never" or "one" for each.
KEEPING = {
    -1: -1,  # M_TRIM_THRESHOLD: memory is given back to the system
    -4: 0,  # M_MMAP_MAX: pages for one array alone
    -8: 1,  # M_ARENA_MAX: heaps
}


def fast_cpu() -> None:
    """Sets XLA's flags, and keeps memory that was used once (see `keep_memory`)."""
    add_xla_flags(*FLAGS)
    keep_memory()


def asked() -> bool:
    """Whether this process, or the one that started it, has called `fast_cpu`."""
    return FLAGS[-1] in os.environ.get("XLA_FLAGS", "")


def add_xla_flags(*flags: str) -> None:
    """Sets flags of XLA for this process and those that it starts."""
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*given, *(f for f in flags if f not in given)])


def keep_memory() -> None:
    """Lets freed memory stay with the process, where the C library is glibc.

    A train step of 124 million parameters frees and takes two gigabytes, page by page:
    a quarter of a second, and on a virtual machine that takes free pages back, several.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for parameter, value in KEEPING.items():
            library.mallopt(parameter, value)
