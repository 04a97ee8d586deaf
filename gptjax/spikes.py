"""Numbers that go wrong: steps in a row without an update, and spikes.

A spike is a loss or a norm of the gradient far above those of the logged steps before:
more than SIGMAS standard deviations over their median. The deviation is that of the
median of distances, which single outliers do not move.

What follows a spike in step s is a matter of `--on-spike`:

    log       it is said, and written to metrics.jsonl
    skip      besides, a step whose gradient is as large changes nothing
    rollback  the run goes back to the last step before s at which it saves, and goes
              on there with the batches that follow that of step s

All of it follows from the metrics of logged steps alone, and of those of steps up to
two before: so a run that was stopped does what it would have done.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

Policy = Literal["log", "skip", "rollback"]
POLICIES = ("log", "skip", "rollback")
IN_A_ROW = 10  # steps without an update that end a run
WINDOW = 128  # logged steps that are looked back on
LEAST = 32  # of them, before anything is called a spike
SIGMAS = 6.0
NARROW = 0.02  # of the median: a deviation is never taken for less
LATE = 2  # steps until the metrics of one can be known
ROLLBACKS = 3  # from the same step, then the run ends


class Seen(NamedTuple):
    """What was logged of one step."""

    step: int
    loss: float
    grad_norm: float


class Spike(NamedTuple):
    """A number that is too large, and what would not have been."""

    step: int
    name: str  # "loss" or "grad_norm"
    value: float
    limit: float


class Jump(NamedTuple):
    """From a step on, so many batches are left out."""

    step: int
    batches: int


def seen_in(events: Iterable[dict[str, Any]], log_every: int) -> list[Seen]:
    """The logged steps of a run, oldest first; those it was stopped at do not count."""
    return [
        Seen(event["step"], event["loss"], event["grad_norm"])
        for event in events
        if event["event"] == "train" and event["step"] % log_every == 0
    ]


def limit(values: Sequence[float]) -> float:
    """Above what the next value is a spike; infinite while there are too few.

    >>> round(limit([1.0, 1.5] * 16), 2), limit([1.0] * 31)
    (3.47, inf)
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < LEAST:
        return math.inf
    middle = statistics.median(finite)
    distance = statistics.median(abs(value - middle) for value in finite)
    deviation = max(1.4826 * distance, NARROW * abs(middle))
    return middle + SIGMAS * deviation


def window_at(seen: Sequence[Seen], step: int) -> list[Seen]:
    """The logged steps that are looked back on from a step."""
    return [one for one in seen[-WINDOW - LATE :] if one.step <= step - LATE][-WINDOW:]


def norm_limit(seen: Sequence[Seen], step: int) -> float:
    """The largest norm of the gradient with which that step is no spike."""
    return limit([one.grad_norm for one in window_at(seen, step)])


def spike_at(seen: Sequence[Seen]) -> Spike | None:
    """What is wrong with the last of the logged steps, if anything."""
    last, before = seen[-1], window_at(seen, seen[-1].step)
    for name in ("loss", "grad_norm"):
        value, most = getattr(last, name), limit([getattr(x, name) for x in before])
        if value > most:
            return Spike(last.step, name, value, most)
    return None


def jump_after(spike: Spike, every: int) -> Jump:
    """Where a run that saves every so many steps goes back to, and what it leaves out.

    >>> jump_after(Spike(25, "loss", 9.0, 3.0), 10)
    Jump(step=20, batches=5)
    """
    step = (spike.step - 1) // every * every
    return Jump(step, spike.step - step)


def spans(jumps: Sequence[Jump], first: int, stop: int) -> list[tuple[int, int]]:
    """From which batch to before which one the steps from `first` to `stop` read.

    >>> spans([Jump(20, 5)], 18, 30)
    [(18, 20), (25, 35)]
    """
    found, left_out = [], 0
    for jump in sorted(jumps):
        if first < jump.step < stop:
            found.append((first + left_out, jump.step + left_out))
            first = jump.step
        if jump.step <= first:
            left_out += jump.batches
    return [*found, (first + left_out, stop + left_out)]
