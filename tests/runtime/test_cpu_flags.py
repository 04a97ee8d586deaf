"""Settings for a CPU: set before JAX starts, and what they are for."""

import subprocess
import sys

import pytest

from gptjax.runtime import cpu_flags

FAULTS = """
import resource
import numpy as np
from gptjax.runtime import cpu_flags
if {keep}:
    cpu_flags.disable_malloc_trim()
def used():
    np.empty(1 << 25).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
used()
before = used()
print(used() - before)
"""
READERS = """
from gptjax.runtime import cpu_flags
if {fast}:
    cpu_flags.enable_fast_cpu()
import jax, jax.numpy as jnp
def twice(x):
    y = jax.lax.optimization_barrier(jnp.sin(x) * x + 1)
    return y @ y, (y * x) @ y
text = jax.jit(twice).lower(jnp.ones((64, 64))).compile().as_text()
print(text.count("opt-barrier("))
"""


def printed(program, **values):
    command = [sys.executable, "-c", program.format(**values)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_used_once_stays():
    assert printed(FAULTS, keep=True) < 100  # of the 65,536 pages that are used


def test_flags_are_added_once_and_after_those_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert not cpu_flags.fast_cpu_requested()

    cpu_flags.add_xla_flags(*cpu_flags.FAST_CPU_XLA_FLAGS)
    cpu_flags.add_xla_flags(*cpu_flags.FAST_CPU_XLA_FLAGS)

    assert cpu_flags.fast_cpu_requested()
    assert cpu_flags.os.environ["XLA_FLAGS"].split() == [
        "--xla_dump_to=x",
        *cpu_flags.FAST_CPU_XLA_FLAGS,
    ]


def test_barriers_stay_where_operations_are_fused():
    assert printed(READERS, fast=False) == 0
    assert printed(READERS, fast=True) == 1
