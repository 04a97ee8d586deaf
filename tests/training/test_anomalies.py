"""Detection of loss and gradient spikes; their effect on a run: `test_trainer`."""

import math

import pytest

from gptjax.training.anomalies import LoggedStep, detect_spike, grad_norm_threshold, history_at

STEADY = [2 + 0.1 * math.sin(n) for n in range(60)]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize(
    ("values", "is_spike"),
    [
        ([*STEADY, 2.1], False),
        ([*STEADY, 4.0], True),
        ([*STEADY, 1e6, 2.0, 1e9, 2.0, 4.0], True),  # earlier spikes hide nothing
        ([1.0] * 31 + [99.0, 99.0], False),  # too short a history
        ([1.0] * 60 + [math.nan], False),
    ],
)
def test_a_spike_is_a_value_far_above_the_previous_ones(name, values, is_spike):
    steady = LoggedStep(0, 1.0, 1.0)
    logged = [steady._replace(step=n, **{name: value}) for n, value in enumerate(values, 1)]

    spike = detect_spike(logged)

    assert (spike is not None) == is_spike
    if spike:
        assert spike[:3] == (len(values), name, 4.0)
        assert 2.1 < spike.threshold < 4
        if name == "grad_norm":
            assert grad_norm_threshold(logged[:-1], len(values)) == spike.threshold


def test_the_threshold_does_not_depend_on_when_metrics_were_read():
    """Metrics of the step before may be known (after a save) or not."""
    logged = [LoggedStep(n, n, n) for n in range(1, 400)]

    for step in (1, 2, 3, 50, 129, 130, 131, 132, 300):
        expected = list(range(max(1, step - 129), step - 1))
        for late in (0, 1):
            history = history_at(logged[: max(step - 2 + late, 0)], step)
            assert [entry.step for entry in history] == expected
