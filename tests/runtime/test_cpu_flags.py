"""Settings of --fast-cpu and their effects, in a process of their own."""

import os
import subprocess
import sys

import pytest

from gptjax.runtime import cpu_flags

PROGRAM = """
import resource
from gptjax.runtime.cpu_flags import enable_fast_cpu
enable_fast_cpu()
import jax, jax.numpy as jnp, numpy as np
def twice(x):
    y = jax.lax.optimization_barrier(jnp.sin(x) * x + 1)
    return y @ y, (y * x) @ y
def count_page_faults():
    np.empty(1 << 25).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
text = jax.jit(twice).lower(jnp.ones((64, 64))).compile().as_text()
before = [count_page_faults() for _ in range(2)][-1]
print(text.count("opt-barrier("), count_page_faults() - before)
"""


def test_flags_are_added_once_and_after_those_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")

    for _ in range(2):
        cpu_flags.add_xla_flags(*cpu_flags.FAST_CPU_XLA_FLAGS)

    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=x", *cpu_flags.FAST_CPU_XLA_FLAGS]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_barriers_are_kept_until_fusion_and_freed_memory_stays_in_the_process():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)

    barriers, page_faults = map(int, result.stdout.split())
    assert barriers == 1  # 0 without the flags
    assert page_faults < 100  # of the 65,536 pages that are used
