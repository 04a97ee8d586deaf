"""Detection of loss and gradient spikes; their effect on a run: `test_trainer`."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.training.anomalies import LoggedStep, detect_spike, grad_norm_threshold, history_at

STEADY = [2 + 0.1 * math.sin(n) for n in range(60)]


def log_losses(losses):
    return [LoggedStep(n, loss, 1.0) for n, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "is_spike"),
    [
        ([*STEADY, 2.1], False),
        ([*STEADY, 4.0], True),
        ([*STEADY, 1e6, 2.0, 1e9, 2.0, 4.0], True),  # earlier spikes hide nothing
        ([1.0] * 30 + [99.0], False),  # too short a history
        ([math.nan] * 60 + [99.0], False),
        ([1.0] * 60 + [math.nan], False),
    ],
)
def test_a_spike_is_a_loss_far_above_the_previous_ones(losses, is_spike):
    spike = detect_spike(log_losses(losses))

    assert (spike is not None) == is_spike
    if spike:
        assert spike[:3] == (len(losses), "loss", 4.0)
        assert 2.1 < spike.threshold < 4


def test_the_gradient_norm_has_a_threshold_of_its_own():
    logged = [LoggedStep(n, 1.0, 2 + 0.1 * math.sin(n)) for n in range(1, 61)]

    spike = detect_spike([*logged, LoggedStep(61, 1.0, 4.0)])

    assert spike[:3] == (61, "grad_norm", 4.0)
    assert 2.1 < grad_norm_threshold(logged, 62) < 4


@given(st.integers(1, 300), st.integers(0, 1))
def test_the_threshold_does_not_depend_on_when_metrics_were_read(step, late):
    """Metrics of the step before may be known (after a save) or not."""
    logged = log_losses(float(n) for n in range(1, 400))

    history = history_at(logged[: step - 2 + late], step)

    assert [entry.step for entry in history] == list(range(max(1, step - 129), step - 1))
