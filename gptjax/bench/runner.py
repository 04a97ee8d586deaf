"""Runs workloads in their own processes, alone or interleaved with a peer.

Each workload starts, compiles and allocates in its own process. Interleaved workloads
then run in alternation, one at a time, so that a machine that slows down affects both;
each turn has an untimed and a timed run. The ratio is the median over adjacent pairs.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gptjax.bench.startup import COMMAND_WORKLOADS
from gptjax.bench.torch_workloads import TORCH_WORKLOADS
from gptjax.bench.workloads import WORKLOADS
from gptjax.errors import GptjaxError
from gptjax.runtime import cpu_flags

WARMUP_RUNS = 2  # runs before timing starts
ISOLATED_ENV = {  # added to the environment of a worker
    "TOKENIZERS_PARALLELISM": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the peer needs GPU memory too
}


class Workload(NamedTuple):
    """Name and options of a workload."""

    name: str  # key of WORKLOADS, TORCH_WORKLOADS or COMMAND_WORKLOADS
    options: dict[str, Any]


class Result(NamedTuple):
    """Units per second: median, minimum and maximum."""

    median: float
    low: float
    high: float
    peak: int = 0  # peak memory of the process in bytes


@contextlib.contextmanager
def worker_process(workload: Workload) -> Iterator[subprocess.Popen[str]]:
    """Starts a worker process for a workload; it exits at the end of the block.

    Raises:
        GptjaxError: the worker failed to start.
    """
    worker = subprocess.Popen(
        [sys.executable, "-m", "gptjax.bench.runner", json.dumps(workload)],
        env=os.environ | ISOLATED_ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:  # closes its pipes on exit, which ends the worker
        if not read_worker_reply(worker):
            raise GptjaxError(f"{workload.name} failed to start; see its output above.")
        yield worker


def read_worker_reply(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """Reads the next reply of a worker; empty if it has exited."""
    line = worker.stdout.readline() if worker.stdout else ""
    return json.loads(line) if line else {}


def run_once(worker: subprocess.Popen[str]) -> tuple[float, int]:
    """Runs the workload once; returns units per second and peak memory in bytes.

    Raises:
        GptjaxError: the worker exited, for example out of memory.
    """
    if worker.stdin:
        worker.stdin.write("work\n")
        worker.stdin.flush()
    if not (reply := read_worker_reply(worker)):
        raise GptjaxError("a benchmark process exited early; see its output above.")
    return reply["units"] / reply["seconds"], reply["peak"]


def run_isolated(workload: Workload, repeats: int) -> Result:
    """Measures one workload."""
    with worker_process(workload) as worker:
        return summarize_runs([run_once(worker) for _ in range(repeats)])


def run_interleaved(
    workload: Workload, peer_workload: Workload, repeats: int
) -> tuple[Result, Result, float]:
    """Measures two workloads in alternation; returns both results and their ratio."""
    with worker_process(workload) as worker, worker_process(peer_workload) as peer_worker:
        paired_runs = []
        for n in range(repeats):
            if n % 2:
                paired_runs.append((run_once(peer_worker), run_once(worker))[::-1])
            else:
                paired_runs.append((run_once(worker), run_once(peer_worker)))
    workload_runs, peer_runs = zip(*paired_runs, strict=True)
    ratio = statistics.median(a / b for (a, _), (b, _) in paired_runs)
    return summarize_runs(workload_runs), summarize_runs(peer_runs), ratio


def summarize_runs(runs: Sequence[tuple[float, int]]) -> Result:
    """Summarizes the rates and peak memory of the runs of one workload."""
    rates, peaks = zip(*runs, strict=True)
    return summarize_rates(rates)._replace(peak=max(peaks))


def summarize_rates(rates: Any) -> Result:
    """Returns median, minimum and maximum."""
    return Result(statistics.median(rates), min(rates), max(rates))


def run_worker(name: str, options: dict[str, Any]) -> None:
    """Sets up a workload, then runs it once for each line on stdin."""
    if name in WORKLOADS and cpu_flags.fast_cpu_requested():
        cpu_flags.disable_malloc_trim()
    work = (WORKLOADS | TORCH_WORKLOADS | COMMAND_WORKLOADS)[name](**options)
    for _ in range(WARMUP_RUNS):
        work()
    print(json.dumps({"ready": name}), flush=True)
    for _ in sys.stdin:
        work()  # after a wait caches are cold and pages reclaimed
        started = time.perf_counter()
        units = work()
        seconds = time.perf_counter() - started
        reply = {"units": units, "seconds": seconds, "peak": process_peak_bytes()}
        print(json.dumps(reply), flush=True)


def process_peak_bytes() -> int:
    """Returns the peak memory of this process or its largest child, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # see getrusage(2)
    process_groups = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return unit * max(
        resource.getrusage(process_group).ru_maxrss for process_group in process_groups
    )


if __name__ == "__main__":
    try:
        run_worker(*json.loads(sys.argv[1]))
    except GptjaxError as error:
        print(f"gptjax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:  # of JAX or PyTorch, for example out of memory
        print(f"{type(error).__name__}: {error}"[:500], file=sys.stderr)
        raise SystemExit(1) from None
