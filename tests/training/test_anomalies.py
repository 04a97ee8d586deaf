"""Detection of loss and gradient spikes; their effect on a run: `test_trainer`."""

import math

import pytest

from gptjax.training.anomalies import LoggedStep, detect_spike, grad_norm_threshold, history_at

STEADY = [2 + 0.1 * math.sin(n) for n in range(60)]


def logged_steps(name, values):
    steady = LoggedStep(0, 1.0, 1.0)
    return [steady._replace(step=n, **{name: value}) for n, value in enumerate(values, 1)]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_spike_is_a_value_far_above_the_previous_ones(name):
    too_short_a_history = [1.0] * 31 + [99.0, 99.0]
    for values in ([*STEADY, 2.1], too_short_a_history, [1.0] * 60 + [math.nan]):
        assert detect_spike(logged_steps(name, values)) is None
    for earlier in (STEADY, [*STEADY, 1e6, 2.0, 1e9, 2.0]):  # earlier spikes hide nothing
        logged = logged_steps(name, [*earlier, 4.0])
        spike = detect_spike(logged)
        assert spike[:3] == (len(logged), name, 4.0)
        assert 2.1 < spike.threshold < 4
        if name == "grad_norm":
            assert grad_norm_threshold(logged[:-1], len(logged)) == spike.threshold


def test_the_threshold_does_not_depend_on_when_metrics_were_read():
    """Metrics of the step before may be known (after a save) or not."""
    logged = [LoggedStep(n, n, n) for n in range(1, 400)]

    for step in (1, 2, 3, 50, 129, 130, 131, 132, 300):
        expected = list(range(max(1, step - 129), step - 1))
        for late in (0, 1):
            history = history_at(logged[: max(step - 2 + late, 0)], step)
            assert [entry.step for entry in history] == expected
