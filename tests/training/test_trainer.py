"""The training loop on a task of one parameter: evaluations, spikes, resuming."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.checkpoint.retention import list_steps
from gptjax.errors import ConfigError, ModelError
from gptjax.runtime.preemption import Interrupted
from gptjax.training import trainer
from gptjax.training.anomalies import SPIKE_POLICIES
from gptjax.training.metrics import read_events
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import init_state, make_train_step
from gptjax.training.trainer import fit
from tests.runs import capture_lines, config_with

CONFIG = {
    "data": {"batch_size": 2},
    "train": {"steps": 18, "log_every": 1, "eval_every": 4},
    "optim": {"warmup_steps": 1},
    "checkpoint": {"every": 3},
}
EVAL_STEPS = [0, 4, 8, 12, 16, 18]
SPIKE = 45  # step with an outlier in its batch


@dataclasses.dataclass
class ScriptedTask:
    """A task with scripted scores and targets, and a record of calls by the trainer."""

    scores: dict[int, float] = dataclasses.field(default_factory=dict)  # by step
    targets: dict[int, float] = dataclasses.field(default_factory=dict)
    fails_at: int = -1  # step whose batch cannot be read, or
    interrupted_at: int = -1  # step whose evaluation is interrupted, or
    stops_at: int = -1  # step after which the run is interrupted
    provenance: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluated: list[int] = dataclasses.field(default_factory=list)
    saved: list[int] = dataclasses.field(default_factory=list)

    def make_task(self) -> Task:
        optimizer = optax.sgd(0.1)
        params = {"w": jnp.zeros(())}
        return Task(
            init_state=init_state(params, optimizer, jax.random.key(0)),
            train_step=make_train_step(squared_error, optimizer),
            batches=self.iterate_batches,
            evaluate=self.evaluate,
            to_model=lambda state: pytest.fail("the trainer needs no model"),
            tokens_per_step=2.0,
            provenance=self.provenance,
            summary=[],
            save_best=lambda state: self.saved.append(int(state.step)),
        )

    def iterate_batches(self, start, stop):
        for step in range(start + 1, stop + 1):
            if step == self.fails_at:
                raise OSError("no such batch")
            yield {"target": np.full(2, self.targets.get(step, 1 + step % 7), np.float32)}

    def evaluate(self, state, step, is_last):
        self.evaluated.append(step)
        if step == self.interrupted_at:
            raise Interrupted("during an evaluation")
        score = self.scores.get(step, 0.0)
        return EvalResult([("eval", {"loss": -score})], f"val {step}.5", (score,))

    def fit(self, run_dir, on_spike="log", **changes):
        """Trains; a run that was interrupted or failed can be continued."""
        run_dir.mkdir(exist_ok=True)
        run = RunContext(config_with(CONFIG, **changes), run_dir, on_spike=on_spike)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "should_stop", lambda run, step: step == self.stops_at)
            return fit(run, self.make_task())

    def interrupt(self, step, run_dir, **options):
        """Trains until the run is interrupted after a step."""
        with pytest.raises(Interrupted, match=f"after step {step};"):
            dataclasses.replace(self, stops_at=step).fit(run_dir, **options)
        assert list_steps(run_dir / "checkpoints")[-1] == step


def squared_error(params, batch, key):
    return jnp.sum((params["w"] - batch["target"]) ** 2), jnp.float32(2)


def values(run_dir, kind, name):
    events = read_events(run_dir / "metrics.jsonl")
    return {e["step"]: e[name] for e in events if e["event"] == kind and name in e}


def test_losses_and_the_best_model_do_not_depend_on_the_event_log(tmp_path):
    scores = {0: 1.0, 4: 9.0, 8: 2.0, 12: 3.0, 16: 8.0, 18: 4.0}
    whole, resumed = ScriptedTask(scores), ScriptedTask(scores)

    state = whole.fit(tmp_path / "whole")
    resumed.interrupt(6, tmp_path / "resumed")
    (tmp_path / "resumed" / "metrics.jsonl").unlink()
    with capture_lines([]) as lines:
        resumed_state = resumed.fit(tmp_path / "resumed")

    assert whole.saved == resumed.saved == [0, 4]
    assert lines[0].endswith("after step 6; the best so far is 4")
    np.testing.assert_array_equal(resumed_state.params["w"], state.params["w"])
    losses = values(tmp_path / "whole", "train", "loss")
    assert values(tmp_path / "resumed", "train", "loss") == {n: losses[n] for n in range(7, 19)}


def test_events_after_the_last_checkpoint_of_a_crashed_run_are_superseded(tmp_path):
    ScriptedTask().fit(tmp_path / "whole")
    run_dir = tmp_path / "run"
    for step, lines in ((2, 1), (11, 2)):  # before the first checkpoint, and after the third
        with pytest.raises(OSError, match="no such batch"):
            ScriptedTask(fails_at=step).fit(run_dir)
        events = (run_dir / "metrics.jsonl").read_text()
        assert events.count('"eval"') >= lines

    ScriptedTask().fit(run_dir)

    assert (run_dir / "metrics.jsonl").read_text().startswith(events)
    for kind in ("train", "eval"):
        expected = values(tmp_path / "whole", kind, "loss")
        assert values(run_dir, kind, "loss") == expected
        assert len([e for e in read_events(run_dir / "metrics.jsonl") if e["event"] == kind]) == (
            len(expected)
        )


def test_ties_go_to_the_earlier_step_and_non_finite_scores_are_never_the_best(tmp_path):
    task = ScriptedTask({0: math.nan, 4: 1.0, 8: math.inf, 12: 1.0, 16: 2.0, 18: math.nan})

    task.fit(tmp_path / "run")

    assert task.saved == [4, 16]


def test_no_step_is_evaluated_twice(tmp_path):
    task, run_dir = ScriptedTask(), tmp_path / "run"

    for step in (4, 5):
        task.interrupt(step, run_dir)
    for _ in range(2):  # the second time, it is finished
        task.fit(run_dir)

    assert task.evaluated == EVAL_STEPS
    assert list(values(run_dir, "eval", "loss")) == EVAL_STEPS


@pytest.mark.parametrize("step", [8, 18])
def test_an_interrupted_evaluation_is_repeated_on_resume(tmp_path, step):
    task, run_dir = ScriptedTask(interrupted_at=step), tmp_path / "run"

    with pytest.raises(Interrupted, match=f"after step {step};"):
        task.fit(run_dir)
    assert list_steps(run_dir / "checkpoints")[-1] == step
    task.interrupted_at = -1
    task.fit(run_dir)

    assert task.evaluated == sorted([*EVAL_STEPS, step])
    assert list(values(run_dir, "eval", "loss")) == EVAL_STEPS


def test_ten_consecutive_skipped_steps_end_the_run_even_across_a_resume(tmp_path):
    targets = dict.fromkeys([2, *range(5, 19)], math.nan)
    task = ScriptedTask(targets=targets)

    task.interrupt(9, tmp_path / "run", train__log_every=4)
    with pytest.raises(ConfigError, match=r"10 .*step 14\. .* step is 4\."):
        task.fit(tmp_path / "run", train__log_every=4)

    assert values(tmp_path / "run", "train", "skipped")[8] == "not finite"


def test_a_run_is_resumed_only_with_unchanged_inputs(tmp_path):
    ScriptedTask(provenance={"data": "a"}).interrupt(3, tmp_path / "run")

    with pytest.raises(ModelError, match=r"data\.source.* was a, now b"):
        ScriptedTask(provenance={"data": "b"}).fit(tmp_path / "run")


@pytest.mark.parametrize("policy", SPIKE_POLICIES)
def test_a_resumed_run_treats_a_spike_as_the_uninterrupted_run(tmp_path, policy):
    task = ScriptedTask(targets={SPIKE: 1e4})
    options = {"train__steps": 50, "train__eval_every": 50, "checkpoint__every": 50}
    options["on_spike"] = policy

    state = task.fit(tmp_path / "whole", **options)
    for step in (44, 45):
        task.interrupt(step, tmp_path / "resumed", **options)
    resumed_state = task.fit(tmp_path / "resumed", **options)

    np.testing.assert_array_equal(resumed_state.params["w"], state.params["w"])
    for run_dir in (tmp_path / "whole", tmp_path / "resumed"):
        assert min(values(run_dir, "spike", "value")) == SPIKE
        skipped = values(run_dir, "train", "skipped")
        assert skipped == ({SPIKE: "spike"} if policy == "skip" else {})
    losses = values(tmp_path / "whole", "train", "loss")
    assert values(tmp_path / "resumed", "train", "loss") == losses
