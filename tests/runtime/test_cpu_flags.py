"""Settings of --fast-cpu and their effects, in processes of their own."""

import subprocess
import sys

import pytest

from gptjax.runtime import cpu_flags

PAGE_FAULTS = """
import resource
import numpy as np
from gptjax.runtime.cpu_flags import disable_malloc_trim
disable_malloc_trim()
def count():
    np.empty(1 << 25).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
count()
before = count()
print(count() - before)
"""
BARRIERS = """
from gptjax.runtime.cpu_flags import enable_fast_cpu
enable_fast_cpu()
import jax, jax.numpy as jnp
def twice(x):
    y = jax.lax.optimization_barrier(jnp.sin(x) * x + 1)
    return y @ y, (y * x) @ y
text = jax.jit(twice).lower(jnp.ones((64, 64))).compile().as_text()
print(text.count("opt-barrier("))
"""


def run_program(program):
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_stays_in_the_process():
    assert run_program(PAGE_FAULTS) < 100  # of the 65,536 pages that are used


def test_flags_are_added_once_and_after_those_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")

    for _ in range(2):
        cpu_flags.add_xla_flags(*cpu_flags.FAST_CPU_XLA_FLAGS)

    flags = cpu_flags.os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=x", *cpu_flags.FAST_CPU_XLA_FLAGS]


def test_optimization_barriers_are_kept_until_operations_are_fused():
    assert run_program(BARRIERS) == 1  # 0 without the flags
