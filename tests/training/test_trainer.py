"""The training loop with a task of one parameter: evaluations, scores and resuming."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.checkpoint.retention import list_steps
from gptjax.config import RunConfig, from_dict
from gptjax.errors import ConfigError
from gptjax.runtime.preemption import Interrupted
from gptjax.training import trainer
from gptjax.training.anomalies import LoggedStep
from gptjax.training.metrics import History, history_from_metadata, read_events
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import init_state, make_train_step
from gptjax.training.trainer import fit
from tests.runs import capture_lines

CONFIG = {
    "data": {"batch_size": 2},
    "train": {"steps": 18, "log_every": 1, "eval_every": 4},
    "optim": {"warmup_steps": 1},
    "checkpoint": {"every": 3},
}


@dataclasses.dataclass
class Scripted:
    """A task with scripted scores and targets, and what the trainer did with it."""

    scores: dict[int, float] = dataclasses.field(default_factory=dict)  # by step
    targets: dict[int, float] = dataclasses.field(default_factory=dict)
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
            provenance={},
            summary=[],
            save_best=lambda state: self.saved.append(int(state.step)),
        )

    def iterate_batches(self, start, stop):
        for step in range(start + 1, stop + 1):
            yield {"target": np.full(2, self.targets.get(step, step), np.float32)}

    def evaluate(self, state, step, is_last):
        self.evaluated.append(step)
        score = self.scores.get(step, 0.0)
        return EvalResult([("eval", {"loss": -score})], f"val {step}.5", (score,))


def squared_error(params, batch, key):
    return jnp.sum((params["w"] - batch["target"]) ** 2), jnp.float32(2)


def fit_here(run_dir, scripted):
    run_dir.mkdir(exist_ok=True)
    run = RunContext(from_dict(RunConfig, CONFIG), run_dir)
    return fit(run, scripted.make_task())


def interrupt_after(step, run_dir, scripted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "should_stop", lambda run, done: done == step)
        with pytest.raises(Interrupted, match=f"after step {step};"):
            fit_here(run_dir, scripted)
    assert list_steps(run_dir / "checkpoints")[-1] == step


def train_losses(run_dir, after=0):
    events = read_events(run_dir / "metrics.jsonl")
    return [(e["step"], e["loss"]) for e in events if e["event"] == "train" and e["step"] > after]


def test_losses_and_the_best_model_do_not_depend_on_the_event_log(tmp_path):
    scores = {0: 1.0, 4: 9.0, 8: 2.0, 12: 3.0, 16: 8.0, 18: 4.0}
    whole, broken = Scripted(scores), Scripted(scores)

    state = fit_here(tmp_path / "whole", whole)
    interrupt_after(6, tmp_path / "broken", broken)
    (tmp_path / "broken" / "metrics.jsonl").unlink()
    resumed = fit_here(tmp_path / "broken", broken)

    assert whole.saved == broken.saved == [0, 4]
    np.testing.assert_array_equal(resumed.params["w"], state.params["w"])
    losses = train_losses(tmp_path / "whole", after=6)
    assert train_losses(tmp_path / "broken") == losses


def test_ties_go_to_the_earlier_step_and_scores_that_are_not_finite_to_none(tmp_path):
    scores = {0: math.nan, 4: 1.0, 8: math.inf, 12: 1.0, 16: 2.0, 18: math.nan}
    scripted = Scripted(scores)

    fit_here(tmp_path / "run", scripted)

    assert scripted.saved == [4, 16]


@pytest.mark.parametrize("step", [4, 5, 8, 16])
def test_no_step_is_evaluated_twice(tmp_path, step):
    scripted, run_dir = Scripted(), tmp_path / "run"

    interrupt_after(step, run_dir, scripted)
    assert scripted.evaluated[-1] == step // 4 * 4
    fit_here(run_dir, scripted)
    fit_here(run_dir, scripted)  # is finished

    assert scripted.evaluated == [0, 4, 8, 12, 16, 18]
    events = read_events(run_dir / "metrics.jsonl")
    steps = [event["step"] for event in events if event["event"] == "eval"]
    assert steps == [0, 4, 8, 12, 16, 18]


def test_a_progress_line_has_an_evaluation_exactly_at_evaluated_steps(tmp_path):
    with capture_lines([]) as lines:
        fit_here(tmp_path / "run", Scripted())

    lines = [line.split(" | ") for line in lines if line.startswith("step ")]
    values = {
        int(first.removeprefix("step ").split("/")[0]): [
            part for part in parts if part.startswith("val ")
        ]
        for first, *parts in lines
    }
    assert len(lines) == len(values) == 19
    evaluated = (0, 4, 8, 12, 16, 18)
    expected = {n: [f"val {n}.5"] if n in evaluated else [] for n in range(19)}
    assert values == expected


def test_consecutive_skips_are_counted_across_a_resume(tmp_path):
    targets = dict.fromkeys(range(5, 19), math.nan)
    scripted = Scripted(targets=targets)

    interrupt_after(9, tmp_path / "run", scripted)
    with pytest.raises(ConfigError, match=r"step 14\. The last good step is 4\."):
        fit_here(tmp_path / "run", scripted)


def test_history_is_the_same_after_a_checkpoint():
    logged = (LoggedStep(3, 0.5, 1.0), LoggedStep(4, math.inf, math.nan))
    history = History((0.5, -2.0), 2, 4, 1, 3, logged)

    metadata = history.to_metadata()
    restored = history_from_metadata(metadata)

    assert metadata["logged"][1] == [4, None, None]
    assert dataclasses.replace(restored, logged=()) == (dataclasses.replace(history, logged=()))
    assert restored.logged[0] == logged[0]
    assert restored.logged[1].step == 4
    assert all(map(math.isnan, restored.logged[1][1:]))
