"""Spikes and skipped steps: detection, and what a run does about them."""

import dataclasses
import math
import signal

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.checkpoint.retention import list_steps
from gptjax.errors import ConfigError
from gptjax.runtime.preemption import Interrupted
from gptjax.tasks import pretrain
from gptjax.tasks.train import TASKS, train
from gptjax.training import anomalies, metrics
from gptjax.training.anomalies import LoggedStep
from gptjax.training.metrics import read_events
from tests.tasks.test_pretrain import losses, make_config

SPIKE = 45  # the step whose loss is made large, where the data of that step are read


def seen(losses):
    return [LoggedStep(n, loss, 1.0) for n, loss in enumerate(losses, 1)]


def test_a_loss_far_above_those_before_is_a_spike_and_one_of_their_kind_is_none():
    steady = [2 + 0.1 * math.sin(n) for n in range(60)]

    assert anomalies.detect_spike(seen([*steady, 2.1])) is None
    found = anomalies.detect_spike(seen([*steady, 4.0]))
    assert (found.step, found.name, found.value) == (61, "loss", 4.0)
    assert 2.1 < found.threshold < 4


def test_earlier_spikes_do_not_hide_a_later_one():
    steady = [2 + 0.1 * math.sin(n) for n in range(60)]

    found = anomalies.detect_spike(seen([*steady, 1e6, 2.0, 1e9, 2.0, 4.0]))

    assert found.value == 4.0


def test_nothing_is_a_spike_before_enough_was_seen_and_what_is_no_number_is_none():
    assert anomalies.detect_spike(seen([1.0] * 30 + [99.0])) is None
    assert anomalies.detect_spike(seen([math.nan] * 60 + [99.0])) is None
    assert anomalies.detect_spike(seen([1.0] * 60 + [math.nan])) is None


@given(st.integers(1, 300), st.integers(0, 1))
def test_what_is_looked_back_on_does_not_depend_on_how_late_metrics_came(step, late):
    """Metrics of the step before may be known (after a save) or not."""
    everything = seen(float(n) for n in range(1, 400))

    window = anomalies.history_at(everything[: step - 2 + late], step)

    assert [one.step for one in window] == list(range(max(1, step - 129), step - 1))


@pytest.fixture
def spiky(monkeypatch):
    """In runs, loss and gradient of one batch are a thousand times as large."""
    stages, make_train_step = TASKS["pretrain"], pretrain.make_train_step

    def make_task(run, data):
        task = stages.make_task(run, data)

        def marked(first, stop):
            for n, batch in enumerate(task.batches(first, stop), first + 1):
                times = np.full(len(batch["tokens"]), FACTORS.get(n, 1), np.float32)
                yield {**batch, "times": times}

        return dataclasses.replace(task, batches=marked)

    def make_step(loss_fn, optimizer, accumulate):
        def larger(params, batch, key):
            rest = {name: leaf for name, leaf in batch.items() if name != "times"}
            nats, weight = loss_fn(params, rest, key)
            return nats * batch["times"][0], weight

        return make_train_step(larger, optimizer, accumulate)

    monkeypatch.setitem(TASKS, "pretrain", stages._replace(make_task=make_task))
    monkeypatch.setattr(pretrain, "make_train_step", make_step)


FACTORS = {SPIKE: 1000.0}
QUICK = {
    "train__steps": 56,
    "train__eval_every": 28,
    "train__sample_prompt": "",
    "checkpoint__every": 10,
}


def events(run, kind):
    return [e for e in read_events(run / "metrics.jsonl") if e["event"] == kind]


def stopped_after(step, config, run, on_spike=""):
    """A run that gets a signal when what that step computed is written."""
    write = metrics.log_train_metrics

    def interrupting(run, done, *rest):
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        return write(run, done, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "log_train_metrics", interrupting)
        with pytest.raises(Interrupted):
            train(config, run, on_spike=on_spike)


@pytest.mark.parametrize("policy", anomalies.SPIKE_POLICIES)
def test_a_run_does_with_a_spike_what_it_was_told_and_the_same_when_resumed(
    spiky, tmp_path, policy
):
    config, whole = make_config(tmp_path, **QUICK), tmp_path / "whole"
    broken = tmp_path / "broken"

    model = train(config, whole, on_spike=policy)
    stopped_after(12, config, broken, policy)
    for step in (44, 46, 50):  # each is stopped a step later, as it is told late
        stopped_after(step, config, broken)
    again = train(config, broken)

    assert losses(whole) == losses(broken)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    spiked = [event["step"] for event in events(whole, "spike")]
    left_out = [event["step"] for event in events(whole, "train") if "skipped" in event]
    expected = {"log": ([SPIKE], []), "skip": ([SPIKE], [SPIKE])}
    assert (spiked, left_out) == expected[policy]


def test_steps_that_change_nothing_end_the_run_and_name_the_last_good_one(spiky, tmp_path):
    config = make_config(tmp_path, **QUICK, train__log_every=4)

    with pytest.MonkeyPatch.context() as patch:
        for step in range(23, 50):
            patch.setitem(FACTORS, step, math.nan)
        for step in (5, 6, 7):  # too few in a row
            patch.setitem(FACTORS, step, math.inf)
        with pytest.raises(ConfigError, match=r"10 consecutive .* good step is 22\."):
            train(config, tmp_path / "run")

    newest = list_steps(tmp_path / "run" / "checkpoints")[-1]
    assert newest in (20, 30)
    skipped = [e["step"] for e in events(tmp_path / "run", "train") if "skipped" in e]
    assert skipped[0] == 24
