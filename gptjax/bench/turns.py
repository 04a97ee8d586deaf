"""Pieces of work in processes of their own, which take turns, and what came of them.

Each side starts, compiles and allocates in its own process. Then one side does its
work while the other waits, one after the other, so that a machine that slows down
slows both: once to warm up, and once against the clock. What counts is the median of
the ratios of neighbours.
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

from gptjax import cpu
from gptjax.bench.commands import COMMANDS
from gptjax.bench.ours import OURS
from gptjax.bench.peers import PEERS
from gptjax.errors import GptjaxError

WARM = 2  # pieces of work before those that are timed
ALONE = {  # the environment of a side, on top of ours
    "TOKENIZERS_PARALLELISM": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the other one needs memory of the GPU
}


class Side(NamedTuple):
    """A piece of work by name, with what it is asked for."""

    name: str  # a key of OURS, PEERS or COMMANDS
    options: dict[str, Any]


class Found(NamedTuple):
    """What a side did, per second: the median, the least and the most."""

    middle: float
    low: float
    high: float
    peak: int = 0  # bytes of memory that its process held at most


@contextlib.contextmanager
def running(side: Side) -> Iterator[subprocess.Popen[str]]:
    """The process of a side, ready to work; it ends with the block.

    Raises:
        GptjaxError: it could not start.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "gptjax.bench.turns", json.dumps(side)],
        env=os.environ | ALONE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:  # which closes its pipes at the end, so that it ends too
        if not answer(child):
            raise GptjaxError(f"{side.name} could not start; it says why above.")
        yield child


def answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a side says, or nothing where it has ended."""
    line = child.stdout.readline() if child.stdout else ""
    return json.loads(line) if line else {}


def turn(child: subprocess.Popen[str]) -> tuple[float, int]:
    """Lets a side work once; units per second, and the most bytes it has held so far.

    Raises:
        GptjaxError: it ended, as for want of memory.
    """
    if child.stdin:
        child.stdin.write("work\n")
        child.stdin.flush()
    if not (found := answer(child)):
        raise GptjaxError("a side ended while it worked; it says why above.")
    return found["units"] / found["seconds"], found["peak"]


def alone(side: Side, times: int) -> Found:
    """The rate of one side."""
    with running(side) as child:
        return together([turn(child) for _ in range(times)])


def against(one: Side, other: Side, pairs: int) -> tuple[Found, Found, float]:
    """The rates of both sides, and how many times as fast the first one is."""
    with running(one) as first, running(other) as second:
        pairs_of_turns = []
        for n in range(pairs):
            if n % 2:
                pairs_of_turns.append((turn(second), turn(first))[::-1])
            else:
                pairs_of_turns.append((turn(first), turn(second)))
    ones, others = zip(*pairs_of_turns, strict=True)
    ratio = statistics.median(a / b for (a, _), (b, _) in pairs_of_turns)
    return together(ones), together(others), ratio


def together(turns: Sequence[tuple[float, int]]) -> Found:
    """What came of the turns of one side."""
    rates, peaks = zip(*turns, strict=True)
    return summary(rates)._replace(peak=max(peaks))


def summary(rates: Any) -> Found:
    """The middle and the ends of some rates."""
    return Found(statistics.median(rates), min(rates), max(rates))


def serve(name: str, options: dict[str, Any]) -> None:
    """Prepares a side, then works once for each line that comes in."""
    if name in OURS and cpu.asked():
        cpu.keep_memory()
    work = (OURS | PEERS | COMMANDS)[name](**options)
    for _ in range(WARM):
        work()
    print(json.dumps({"ready": name}), flush=True)
    for _ in sys.stdin:
        work()  # who has waited finds caches cold, and pages taken by the system
        started = time.perf_counter()
        units = work()
        seconds = time.perf_counter() - started
        said = {"units": units, "seconds": seconds, "peak": peak_bytes()}
        print(json.dumps(said), flush=True)


def peak_bytes() -> int:
    """The most memory that this process, or one that it started, has held."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each system
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return unit * max(resource.getrusage(who).ru_maxrss for who in both)


if __name__ == "__main__":
    try:
        serve(*json.loads(sys.argv[1]))
    except GptjaxError as error:
        print(f"gptjax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:  # of JAX or PyTorch, as for want of memory
        print(f"{type(error).__name__}: {error}"[:500], file=sys.stderr)
        raise SystemExit(1) from None
