"""Runs two workloads in alternation, each in a process of its own.

JAX would not release the memory that PyTorch needs. The workloads run one at a time, in
turns, so that a machine that slows down affects both; the ratio is the median over
adjacent pairs.
"""

import functools
import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

from gptjax.runtime import cpu_flags

WARMUP_RUNS = 2  # runs before timing starts
_work = []  # of a worker process


def new_process():
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def in_new_process(function, *args):
    """Calls a function of a module in a new process and returns its result."""
    with new_process() as pool:
        return pool.submit(function, *args).result()


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


def run_interleaved(make_work, make_peer_work, repeats):
    """Returns (units per second, peak memory) of both, and the ratio of their rates."""
    runs, peer_runs = [], []
    with new_process() as pool, new_process() as peer_pool:
        pool.submit(_set_up, make_work).result()
        peer_pool.submit(_set_up, make_peer_work).result()
        sides = [(runs, pool), (peer_runs, peer_pool)]
        for _ in range(repeats):
            for side_runs, side_pool in sides:
                side_runs.append(side_pool.submit(_time_once).result())
            sides.reverse()  # neither side always goes first
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(runs, peer_runs, strict=True))
    ours, theirs = (
        (statistics.median(rates), max(peaks))
        for rates, peaks in (zip(*side, strict=True) for side in (runs, peer_runs))
    )
    return ours, theirs, ratio
