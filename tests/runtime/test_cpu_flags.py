"""Settings of --fast-cpu and their effects, in a process of their own."""

import os
import subprocess
import sys

import pytest

from gptjax.runtime.cpu_flags import FAST_CPU_XLA_FLAGS

PROGRAM = """
import os, resource
from gptjax.runtime.cpu_flags import enable_fast_cpu
enable_fast_cpu()
enable_fast_cpu()  # adds no flag again
import jax, jax.numpy as jnp, numpy as np
def twice(x):
    y = jax.lax.optimization_barrier(jnp.sin(x) * x + 1)
    return y @ y, (y * x) @ y
def count_page_faults():
    np.empty(1 << 25).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
text = jax.jit(twice).lower(jnp.ones((64, 64))).compile().as_text()
before = [count_page_faults() for _ in range(2)][-1]
print(text.count("opt-barrier("), count_page_faults() - before, os.environ["XLA_FLAGS"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_barriers_are_kept_until_fusion_and_freed_memory_stays_in_the_process():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)

    barriers, page_faults, *flags = result.stdout.decode().split()
    assert barriers == "1"  # 0 without the flags
    assert int(page_faults) < 100  # of the 65,536 pages that are used
    assert flags == [*os.environ["XLA_FLAGS"].split(), *FAST_CPU_XLA_FLAGS]
