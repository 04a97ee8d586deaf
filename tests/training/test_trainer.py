"""The training loop on a task of one parameter: evaluations, spikes, resuming."""

import contextlib
import itertools
import math
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.checkpoint.retention import list_steps
from gptjax.errors import DivergenceError, ModelError
from gptjax.runtime import timing
from gptjax.runtime.preemption import Interrupted
from gptjax.training import trainer
from gptjax.training.anomalies import SPIKE_POLICIES
from gptjax.training.metrics import read_events
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import init_state, make_train_step
from gptjax.training.trainer import prefetch_to_device
from tests.runs import capture_lines, config_with
from tests.small_models import make_model

CONFIG = {
    "data": {"batch_size": 2},
    "train": {"steps": 18, "log_every": 1, "eval_every": 4},
    "optim": {"warmup_steps": 1},
    "checkpoint": {"every": 3},
}
MODEL = make_model()
EVAL_STEPS = [0, 4, 8, 12, 16, 18]
SPIKE = 45  # step with an outlier in its batch


def squared_error(params, batch, key):
    return jnp.sum((params["w"] - batch["target"]) ** 2), jnp.float32(2)


class Script:
    """Scores and targets by step, and a record of evaluations and of best models."""

    def __init__(self, scores=(), targets=(), provenance=()):
        self.scores, self.targets = dict(scores), dict(targets)
        self.provenance, self.evaluated, self.saved = dict(provenance), [], []
        self.threads = set()  # that outlived a run

    def fit(self, run_dir, *, stops_at=-1, fails_at=-1, cut_at=-1, on_spike="log", **changes):
        """Trains until it is stopped after a step, cannot read it, or evaluates it."""

        def batches(start, stop):
            for step in range(start + 1, stop + 1):
                if step == fails_at:
                    raise OSError("no such batch")
                yield {"target": np.full(2, self.targets.get(step, 1 + step % 7), np.float32)}

        def evaluate(state, step, is_last):
            self.evaluated.append(step)
            if step == cut_at:
                raise Interrupted
            score = self.scores.get(step, 0.0)
            return EvalResult([("eval", {"loss": -score})], f"val {step}.5", (score,))

        optimizer = optax.sgd(0.1)
        task = Task(
            init_state=init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0)),
            train_step=make_train_step(squared_error, optimizer),
            batches=batches,
            evaluate=evaluate,
            to_model=lambda state: MODEL,
            tokens_per_step=2.0,
            provenance=self.provenance,
            summary=[],
            save_best=lambda state: self.saved.append(int(state.step)),
        )
        run_dir.mkdir(exist_ok=True)
        run = RunContext(config_with(CONFIG, **changes), run_dir, on_spike=on_spike)
        last, state, threads = max(stops_at, cut_at), None, set(threading.enumerate())
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            stack.callback(lambda: self.threads.update(set(threading.enumerate()) - threads))
            patch.setattr(trainer, "should_stop", lambda run, step: step == stops_at)
            if last >= 0:
                stack.enter_context(pytest.raises(Interrupted, match=f"after step {last};"))
            state = trainer.fit(run, task)
        assert list_steps(run_dir / "checkpoints")[-1] == last or state
        return state


def values(run_dir, kind, name):
    events = read_events(run_dir / "metrics.jsonl")
    return {e["step"]: e[name] for e in events if e["event"] == kind and name in e}


def test_losses_and_the_best_model_do_not_depend_on_the_event_log(tmp_path):
    # Ties go to the earlier step, and non-finite scores are never the best.
    scores = {0: math.nan, 4: 1.0, 8: math.inf, 12: 1.0, 16: 2.0, 18: 1.5}
    whole, resumed = Script(scores), Script(scores)

    state = whole.fit(tmp_path / "whole")
    resumed.fit(tmp_path / "resumed", stops_at=6)
    (tmp_path / "resumed" / "metrics.jsonl").unlink()
    with capture_lines([]) as lines:
        resumed_state = resumed.fit(tmp_path / "resumed")

    assert whole.saved == resumed.saved == [4, 16]
    assert lines[0].endswith("after step 6; the best so far is 4")
    np.testing.assert_array_equal(resumed_state.params["w"], state.params["w"])
    losses = values(tmp_path / "whole", "train", "loss")
    assert values(tmp_path / "resumed", "train", "loss") == {n: losses[n] for n in range(7, 19)}


def test_events_after_the_last_checkpoint_of_a_crashed_run_are_superseded(tmp_path):
    Script().fit(tmp_path / "whole")
    run_dir, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    for step in (2, 11):  # before the first checkpoint, and after the third
        with pytest.raises(OSError, match="no such batch"):
            Script().fit(run_dir, fails_at=step)
    events = log.read_text()

    Script().fit(run_dir)

    assert log.read_text().startswith(events)
    assert list(values(run_dir, "resume", "event")) == [0, 9]
    for kind in ("train", "eval"):
        assert values(run_dir, kind, "loss") == values(tmp_path / "whole", kind, "loss")


def test_a_step_is_evaluated_again_only_if_its_evaluation_was_interrupted(tmp_path):
    script, run_dir = Script(), tmp_path / "run"

    for step in (4, 5):
        script.fit(run_dir, stops_at=step)
    script.fit(run_dir, cut_at=8)
    for _ in range(2):  # the second time, it is finished
        script.fit(run_dir)
    last = Script()
    last.fit(tmp_path / "last", cut_at=18)
    last.fit(tmp_path / "last")

    assert script.evaluated == sorted([*EVAL_STEPS, 8])
    assert last.evaluated == [*EVAL_STEPS, 18]
    for folder in (run_dir, tmp_path / "last"):
        assert list(values(folder, "eval", "loss")) == EVAL_STEPS


def test_ten_consecutive_skipped_steps_end_the_run_even_across_a_resume(tmp_path):
    script = Script(targets=dict.fromkeys([2, *range(5, 19)], math.nan))

    script.fit(tmp_path / "run", stops_at=9, train__log_every=4)
    with pytest.raises(DivergenceError, match=r"10 .*step 14\. .* step is 4\."):
        script.fit(tmp_path / "run", train__log_every=4)

    assert values(tmp_path / "run", "train", "skipped")[8] == "not finite"


@pytest.mark.parametrize(
    ("nan_evaluations", "nan_batches", "step"), [((4, 12, 16, 18), (), 12), ((18,), (17, 18), 17)]
)
def test_a_run_without_a_finite_loss_at_the_end_fails_with_1_each_time(
    tmp_path, nan_evaluations, nan_batches, step
):
    nan_scores, nan_targets = (
        dict.fromkeys(steps, math.nan) for steps in (nan_evaluations, nan_batches)
    )
    script = Script(nan_scores, nan_targets)

    script.fit(tmp_path / "run", stops_at=17)
    for _ in range(2):  # the second time, nothing is left to train
        with pytest.raises(DivergenceError, match=f"step {step},") as raised:
            script.fit(tmp_path / "run")

    assert raised.value.exit_code == 1
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == 18


def test_a_run_in_which_no_step_was_applied_fails(tmp_path):
    with pytest.raises(DivergenceError, match="step 1,"):
        Script(targets=dict.fromkeys(range(1, 7), math.nan)).fit(tmp_path, train__steps=6)


def test_the_speed_of_the_first_steps_excludes_their_compilation(tmp_path, monkeypatch):
    clock, compile_step = itertools.count(), trainer.aot_compile

    def compile_for_an_hour(*args):
        next(itertools.islice(clock, 3600, None))
        return compile_step(*args)

    now = types.SimpleNamespace(perf_counter=lambda: float(next(clock)))  # one second each
    monkeypatch.setattr(timing, "time", now)
    monkeypatch.setattr(trainer, "aot_compile", compile_for_an_hour)

    Script().fit(tmp_path / "run")

    assert min(values(tmp_path / "run", "train", "tokens_per_s").values()) > 2 / 60


def test_a_run_is_resumed_only_with_unchanged_inputs(tmp_path):
    Script(provenance={"data": "a"}).fit(tmp_path / "run", stops_at=3)

    with pytest.raises(ModelError, match=r"data\.source.* was a, now b"):
        Script(provenance={"data": "b"}).fit(tmp_path / "run")


@pytest.mark.parametrize("policy", SPIKE_POLICIES)
def test_a_resumed_run_treats_a_spike_as_the_uninterrupted_run(tmp_path, policy):
    script = Script(targets={SPIKE: 1e4})
    options = {"train__steps": 50, "train__eval_every": 50, "checkpoint__every": 50}

    state = script.fit(tmp_path / "whole", on_spike=policy, **options)
    for step in (44, 45):
        script.fit(tmp_path / "run", stops_at=step, on_spike=policy, **options)
    resumed_state = script.fit(tmp_path / "run", on_spike=policy, **options)

    np.testing.assert_array_equal(resumed_state.params["w"], state.params["w"])
    for run_dir in (tmp_path / "whole", tmp_path / "run"):
        assert min(values(run_dir, "spike", "value")) == SPIKE
        skipped = values(run_dir, "train", "skipped")
        assert skipped == ({SPIKE: "spike"} if policy == "skip" else {})
    losses = values(tmp_path / "whole", "train", "loss")
    assert values(tmp_path / "run", "train", "loss") == losses


@pytest.mark.parametrize("end", [{}, {"stops_at": 5}, {"cut_at": 4}, {"fails_at": 5}])
def test_no_thread_outlives_a_run(tmp_path, end):
    script = Script()
    with contextlib.suppress(OSError):
        script.fit(tmp_path, **end)
    assert not script.threads


def test_prefetched_results_are_those_of_map_and_made_ahead():
    made = [threading.Event() for _ in range(4)]

    def make(n):
        made[n].set()
        return 2 * n

    results = []
    for result in prefetch_to_device(range(4), make, size=2):
        results.append(result)
        assert made[min(len(results) + 1, 3)].wait(60)
        assert len(results) > 1 or not made[3].is_set()

    assert results == [0, 2, 4, 6]


def test_errors_of_prefetching_are_raised_in_place_of_the_result_and_no_thread_is_left():
    results = prefetch_to_device(itertools.chain([1, 0], itertools.count(2)), lambda n: 6 // n)

    assert next(results) == 6
    with pytest.raises(ZeroDivisionError):
        next(results)
    results = prefetch_to_device(itertools.count(), str)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
