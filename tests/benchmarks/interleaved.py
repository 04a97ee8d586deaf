"""Runs workloads in processes of their own, alone or two in alternation.

Each workload compiles and allocates in its own process: JAX would not release the
memory that PyTorch needs. Two workloads run one at a time, in turns, so that a machine
that slows down affects both; the ratio is the median over adjacent pairs.
"""

import contextlib
import functools
import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from gptjax.runtime import cpu_flags

WARMUP_RUNS = 2  # runs before timing starts
_work = []  # of a worker process


class Result(NamedTuple):
    """Units per second and peak memory of the process."""

    median: float
    low: float
    high: float
    peak_bytes: int


def in_new_process(function, *args):
    """Calls a function of a module in a new process and returns its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextlib.contextmanager
def start_worker(make_work):
    """Sets up work in a new process; yields the function that times it once."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(_set_up, make_work).result()
            yield lambda: pool.submit(_time_once).result()
        except BrokenProcessPool as error:
            name = getattr(make_work, "func", make_work).__name__
            raise RuntimeError(f"the process of {name} was killed: is memory full?") from error


def _set_up(make_work):
    function = make_work.func if isinstance(make_work, functools.partial) else make_work
    is_fast = cpu_flags.FAST_CPU_XLA_FLAGS[-1] in os.environ.get("XLA_FLAGS", "")
    if function.__module__.startswith("gptjax.") and is_fast:
        cpu_flags.disable_malloc_trim()  # not for peers
    _work.append(make_work())
    for _ in range(WARMUP_RUNS):
        _work[0]()


def _time_once():
    _work[0]()  # after a wait caches are cold and pages reclaimed
    started = time.perf_counter()
    units = _work[0]()
    seconds = time.perf_counter() - started
    processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(process).ru_maxrss for process in processes)
    return units / seconds, 1024 * peak


def summarize_runs(runs):
    """Summarizes rates and peak memory of the runs of one workload."""
    rates, peaks = zip(*runs, strict=True)
    return Result(statistics.median(rates), min(rates), max(rates), max(peaks))


def run_isolated(make_work, repeats):
    """Measures one workload."""
    with start_worker(make_work) as run_once:
        return summarize_runs([run_once() for _ in range(repeats)])


def run_interleaved(make_work, make_peer_work, repeats):
    """Measures two workloads in alternation; returns both results and their ratio."""
    runs, peer_runs = [], []
    with start_worker(make_work) as run_once, start_worker(make_peer_work) as run_peer:
        sides = [(runs, run_once), (peer_runs, run_peer)]
        for _ in range(repeats):
            for side_runs, run_side in sides:
                side_runs.append(run_side())
            sides.reverse()  # neither side always goes first
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(runs, peer_runs, strict=True))
    return summarize_runs(runs), summarize_runs(peer_runs), ratio
