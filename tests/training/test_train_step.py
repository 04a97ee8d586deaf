"""The train step: accumulation, skipped steps, determinism, exact resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import GPTConfig, OptimConfig
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import Metrics, init_state, make_train_step, train_steps
from tests.small_models import random_params

B, T, V = 4, 8, 50
SHAPE = {"n_layers": 1, "n_heads": 2, "d_model": 16, "dtype": "float32"}
TINY = GPTConfig(vocab_size=V, context_length=T, **SHAPE)
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default
PARAMS = random_params(TINY)


def batch_at(step, weight_BT=None):
    row_BT = np.random.default_rng(step).integers(V, size=(B, T + 1), dtype=np.int32)
    weight_BT = np.ones((B, T), np.float32) if weight_BT is None else weight_BT
    batch = {"tokens": row_BT[:, :-1], "targets": row_BT[:, 1:], "loss_weights": weight_BT}
    return batch | {"positions": None, "segment_ids": None}


loss_fn = make_lm_loss_fn(TINY, T)
SGD = optax.sgd(1.0)
ADAMW = make_optimizer(OptimConfig(peak_lr=3e-2, warmup_steps=2, schedule="constant"), 100)
adamw_step = jax.jit(make_train_step(loss_fn, ADAMW), donate_argnums=0)
UNEVEN = np.array([[1] * 8, [0] * 8, [1] + [0] * 7, [0, 1, 1, 0, 0, 1, 1, 1]], "f4")


def adamw_state():
    return init_state(jax.tree.map(jnp.array, PARAMS), ADAMW, jnp.copy(KEY))


def sgd_step(loss_fn, accumulate=1, params=None):
    """A step that subtracts the gradient, and a state."""
    state = init_state(params or {"bias": jnp.zeros(())}, SGD, KEY)
    return jax.jit(make_train_step(loss_fn, SGD, accumulate)), state


@pytest.mark.fast
def test_micro_batches_have_the_gradient_of_the_whole_batch():
    """Row 1 has weight 0, so that one of four micro-batches is empty."""
    results = []
    for groups in (1, 4):
        step_fn, state = sgd_step(loss_fn, groups, PARAMS)
        state, metrics = step_fn(state, batch_at(0, UNEVEN))
        results.append((jax.tree.map(jnp.subtract, state.params, PARAMS), metrics))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6), *results)
    assert float(metrics.tokens) == UNEVEN.sum()


def test_micro_batches_take_every_nth_row_and_have_their_own_key_in_each_step():
    def record(params, batch, key):
        jax.debug.callback(lambda *args: calls.append(args), batch, jax.random.bits(key))
        return 0 * params["bias"], jnp.sum(batch)

    calls = []
    step_fn, state = sgd_step(record, accumulate=2)

    for _ in range(2):
        state, _ = step_fn(state, jnp.arange(6))
    jax.effects_barrier()

    assert [list(batch) for batch, _ in calls] == [[0, 2, 4], [1, 3, 5]] * 2
    assert len({int(bits) for _, bits in calls}) == 4


@pytest.mark.fast
def test_a_non_finite_step_changes_only_the_counts():
    state, _ = adamw_step(adamw_state(), batch_at(0))

    for n, bad in enumerate((np.nan, np.inf), 1):
        before = jax.tree.map(jnp.copy, state)
        state, metrics = adamw_step(state, batch_at(1, np.where(UNEVEN, 1, bad)))
        assert not bool(metrics.applied)
        jax.tree.map(np.testing.assert_array_equal, state[1:3], before[1:3])
        assert (int(state.step), int(state.num_skipped)) == (1 + n, n)
    state, metrics = adamw_step(state, batch_at(0, 0 * UNEVEN))
    assert bool(metrics.applied)  # a batch without weight has loss 0
    assert float(metrics.loss) == 0
    state, metrics = adamw_step(state, batch_at(2))
    assert bool(metrics.applied)
    change = state.params["final_norm"]["bias"] - before.params["final_norm"]["bias"]
    assert jnp.all(jnp.isfinite(change) & (change != 0))


def test_steps_of_a_non_finite_gradient_or_one_above_the_threshold_are_skipped():
    def root(params, batch, key):
        return jnp.sqrt(params["bias"]) * batch, batch

    def linear(params, batch, key):
        return params["bias"] * batch, jnp.float32(1)

    for loss_fn, threshold, applied in ((root, np.inf, 0), (linear, 2.9, 0), (linear, 3.0, 1)):
        step_fn, state = sgd_step(loss_fn)
        after, metrics = step_fn(state, jnp.float32(3), threshold)
        assert jnp.isfinite(metrics.loss)
        assert bool(metrics.applied) == applied
        assert (float(after.params["bias"]), int(after.num_skipped)) == (-3 * applied, 1 - applied)


@pytest.mark.fast
def test_the_loop_overfits_one_batch():
    loop = train_steps(adamw_state(), adamw_step, [batch_at(0)] * 60)
    losses = [float(metrics.loss) for _, _, metrics in loop]

    assert losses[10] < losses[0] / 2
    assert losses[-1] < 0.1


def test_the_loop_takes_a_batch_only_on_demand_and_reads_no_metric():
    batches = iter(range(3))
    metrics = Metrics(*[object()] * 4)  # reading any of them would fail
    state = init_state({}, optax.identity(), KEY)._replace(step=jnp.int32(7))

    loop = train_steps(state, lambda state, batch: (state, metrics), batches)

    assert next(loop)[0] == 8
    assert next(batches) == 1
    assert [step for step, _, _ in loop] == [9]
