"""Training anomalies: loss spikes, gradient spikes and consecutive skipped steps.

A spike is a loss or gradient norm more than NUM_SIGMAS standard deviations above the
median of the previous logged steps. The standard deviation is estimated from the median
absolute deviation, which is robust to outliers. Spikes are logged; `--on-spike skip`
also skips each step with a gradient norm above the threshold.

Decisions depend only on the metrics of logged steps, at least METRICS_LAG steps old, so
an interrupted and resumed run takes the same ones.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

SpikePolicy = Literal["log", "skip"]
SPIKE_POLICIES = ("log", "skip")
MAX_CONSECUTIVE_SKIPS = 10  # skipped steps that end a run
MAX_HISTORY = 128  # logged steps
MIN_HISTORY = 32  # logged steps before spikes are detected
NUM_SIGMAS = 6.0
MIN_RELATIVE_SIGMA = 0.02  # lower bound of sigma, as a fraction of the median
METRICS_LAG = 2  # steps until the metrics of a step are available on the host
MAX_LOGGED_STEPS = MAX_HISTORY + METRICS_LAG  # that the thresholds depend on


class LoggedStep(NamedTuple):
    """Logged metrics of one step."""

    step: int
    loss: float
    grad_norm: float


class Spike(NamedTuple):
    """Metric above its spike threshold."""

    step: int
    name: str  # "loss" or "grad_norm"
    value: float
    threshold: float


def spike_threshold(values: Sequence[float]) -> float:
    """Value above which the next one is a spike; infinite while history is too short.

    >>> round(spike_threshold([1.0, 1.5] * 16), 2), spike_threshold([1.0] * 31)
    (3.47, inf)
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < MIN_HISTORY:
        return math.inf
    median = statistics.median(finite)
    mad = statistics.median(abs(value - median) for value in finite)
    sigma = max(1.4826 * mad, MIN_RELATIVE_SIGMA * abs(median))
    return median + NUM_SIGMAS * sigma


def history_at(logged: Sequence[LoggedStep], step: int) -> list[LoggedStep]:
    """Logged steps that the spike threshold of a step is computed from."""
    known = [entry for entry in logged[-MAX_LOGGED_STEPS:] if entry.step <= step - METRICS_LAG]
    return known[-MAX_HISTORY:]


def grad_norm_threshold(logged: Sequence[LoggedStep], step: int) -> float:
    """Gradient norm above which that step is a spike."""
    return spike_threshold([entry.grad_norm for entry in history_at(logged, step)])


def detect_spike(logged: Sequence[LoggedStep]) -> Spike | None:
    """Spike in the last logged step, or None."""
    last, history = logged[-1], history_at(logged, logged[-1].step)
    for name in ("loss", "grad_norm"):
        value = getattr(last, name)
        threshold = spike_threshold([getattr(entry, name) for entry in history])
        if value > threshold:
            return Spike(last.step, name, value, threshold)
    return None
