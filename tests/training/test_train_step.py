"""The step: accumulated = whole, bad steps undone, the same seed the same run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.config import GPTConfig, OptimConfig
from gptjax.model.gpt import hidden_states, unembedding_matrix
from gptjax.training.loss import fused_cross_entropy
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import Metrics, init_state, make_train_step, train_steps

B, T, V = 4, 8, 50
SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "dtype": "float32"}
TINY = GPTConfig(vocab_size=V, context_length=T, **SHAPE)
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default


@functools.cache
def start():
    """Parameters on the host: a step may be given its own copy to consume."""
    params = jax.jit(functools.partial(gptjax.init, TINY))(KEY)
    return jax.tree.map(np.asarray, params)


def batch_at(step, weight_BT=None):
    row_BT = np.random.default_rng(step).integers(V, size=(B, T + 1), dtype=np.int32)
    weight_BT = np.ones((B, T), np.float32) if weight_BT is None else weight_BT
    return {"tokens": row_BT[:, :-1], "targets": row_BT[:, 1:], "loss_weights": weight_BT}


def loss_fn(params, batch, key, config=TINY):
    dropout_key = key if config.dropout else None
    x_BTD, _ = hidden_states(config, params, batch["tokens"], dropout_key=dropout_key)
    table_VD, weight_BT = unembedding_matrix(config, params), batch["loss_weights"]
    nats = fused_cross_entropy(config, x_BTD, table_VD, batch["targets"], weight_BT, T)
    return nats, jnp.sum(weight_BT)


@functools.cache
def adamw_step():
    """A compiled step, and the state that it starts from anew at each call."""
    optim = OptimConfig(peak_lr=3e-2, warmup_steps=2, schedule="constant")
    optimizer = make_optimizer(optim, 100)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
    return step_fn, lambda: init_state(jax.tree.map(jnp.array, start()), optimizer, jnp.copy(KEY))


def assert_equal(tree, other):
    def equal(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(equal, tree, other)


UNEVEN = np.array([[1] * 8, [0] * 8, [1] + [0] * 7, [0, 1, 1, 0, 0, 1, 1, 1]], "f4")


@pytest.mark.fast
def test_micro_batches_have_the_gradient_of_the_whole_batch():
    """Row 1 has weight 0, so that one of four micro-batches is empty."""
    optimizer, batch = optax.sgd(1.0), batch_at(0, UNEVEN)

    def after(groups):
        step_fn = jax.jit(make_train_step(loss_fn, optimizer, groups))
        state, metrics = step_fn(init_state(start(), optimizer, KEY), batch)
        return jax.tree.map(jnp.subtract, state.params, start()), metrics

    gradient, expected = after(1)
    for groups in (2, 4):
        parts, metrics = after(groups)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, parts)
        np.testing.assert_allclose(metrics, expected, rtol=1e-6)
        assert float(metrics.tokens) == UNEVEN.sum()


def test_micro_batches_take_rows_in_turn_and_each_has_its_own_key():
    def nats(params, batch, key):
        jax.debug.callback(lambda *seen: rows.append(seen), batch, jax.random.bits(key))
        return 0 * params["bias"], jnp.sum(batch)

    rows, optimizer = [], optax.sgd(1.0)
    state = init_state({"bias": jnp.zeros(())}, optimizer, KEY)

    jax.jit(make_train_step(nats, optimizer, 2))(state, jnp.arange(6))
    jax.effects_barrier()

    assert [list(batch) for batch, _ in rows] == [[0, 2, 4], [1, 3, 5]]
    assert len({int(bits) for _, bits in rows}) == 2


def test_a_batch_without_weight_has_loss_zero_and_stays_finite():
    step_fn, fresh = adamw_step()

    state, metrics = step_fn(fresh(), batch_at(0, np.zeros((B, T), np.float32)))

    assert float(metrics.loss) == 0
    assert bool(metrics.applied)
    assert jax.tree.all(jax.tree.map(lambda p: jnp.all(jnp.isfinite(p)), state.params))


@pytest.mark.fast
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad):
    step_fn, fresh = adamw_step()
    weight_BT = np.ones((B, T), np.float32)
    weight_BT[1, 2] = bad
    before, _ = step_fn(fresh(), batch_at(0))
    kept = jax.tree.map(jnp.copy, before)

    after, metrics = step_fn(before, batch_at(1, weight_BT))

    assert not bool(metrics.applied)
    assert_equal((after.params, after.opt_state), (kept.params, kept.opt_state))
    assert (int(after.step), int(after.num_skipped)) == (2, 1)
    after, metrics = step_fn(after, batch_at(2))
    assert bool(metrics.applied)
    assert (int(after.step), int(after.num_skipped)) == (3, 1)
    assert jnp.any(after.params["final_norm"]["bias"] != kept.params["final_norm"]["bias"])


def test_a_step_whose_gradient_is_above_the_limit_changes_nothing_either():
    optimizer, batch = optax.sgd(1.0), batch_at(0)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer))
    _, metrics = step_fn(init_state(start(), optimizer, KEY), batch)
    norm = np.float32(metrics.grad_norm)

    for limit, made in ((norm * 0.9, False), (norm * 1.1, True)):
        state, metrics = step_fn(init_state(start(), optimizer, KEY), batch, limit)
        assert bool(metrics.applied) == made
        assert int(state.num_skipped) == (not made)
        before = start()["final_norm"]["bias"]
        after = state.params["final_norm"]["bias"]
        assert np.array_equal(before, after) == (not made)


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped_too():
    def root(params, batch, key):
        return jnp.sqrt(params["bias"]) * batch, batch

    optimizer = optax.sgd(1.0)
    state = init_state({"bias": jnp.zeros(())}, optimizer, KEY)

    state, metrics = jax.jit(make_train_step(root, optimizer))(state, jnp.ones(()))

    assert jnp.isfinite(metrics.loss)
    assert not bool(metrics.applied)
    assert (float(state.params["bias"]), int(state.num_skipped)) == (0, 1)


@pytest.mark.fast
def test_ten_steps_overfit_one_batch():
    step_fn, fresh = adamw_step()

    losses = [
        float(metrics.loss) for _, _, metrics in train_steps(fresh(), step_fn, [batch_at(0)] * 60)
    ]

    assert losses[0] == pytest.approx(np.log(V), rel=0.05)
    assert losses[10] < losses[0] / 2
    assert losses[-1] < 0.1


def test_the_state_is_updated_in_place():
    step_fn, fresh = adamw_step()
    state = fresh()
    places = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.params)}

    after, _ = step_fn(state, batch_at(0))

    arrays = jax.tree.leaves((state.params, state.opt_state, state.step))
    assert all(array.is_deleted() for array in arrays)
    reused = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(after.params)}
    assert len(places & reused) > len(places) / 2


def run(state, first, stop):
    """The state at the end, and the metrics of every step."""
    step_fn, _ = adamw_step()
    batches, seen = map(batch_at, range(first, stop)), []
    for _, state, metrics in train_steps(state, step_fn, batches):  # noqa: B007, B020
        seen.append(metrics)
    return state, seen


@pytest.mark.fast
def test_the_same_seed_gives_the_same_run_to_the_last_bit():
    _, fresh = adamw_step()

    assert_equal(run(fresh(), 0, 4), run(fresh(), 0, 4))


def test_six_steps_are_three_steps_and_three_more_to_the_last_bit():
    _, fresh = adamw_step()

    unbroken, seen = run(fresh(), 0, 6)
    halfway, early = run(fresh(), 0, 3)
    resumed, late = run(jax.tree.map(jnp.copy, halfway), 3, 6)

    assert_equal((unbroken, seen), (resumed, early + late))


def test_each_step_drops_other_activations():
    config = dataclasses.replace(TINY, dropout=0.5)
    optimizer = optax.sgd(0.0)  # the parameters stay, so only the key differs
    step_fn = jax.jit(make_train_step(functools.partial(loss_fn, config=config), optimizer))
    state = init_state(start(), optimizer, KEY)

    norms = [
        float(metrics.grad_norm) for _, _, metrics in train_steps(state, step_fn, [batch_at(0)] * 3)
    ]

    assert len(set(norms)) == 3


def test_the_loop_takes_a_batch_only_when_its_caller_asks_and_reads_no_metric():
    taken = []

    def batches():
        for n in range(3):
            taken.append(n)
            yield n

    def step_fn(state, batch):
        return state, Metrics(*[object()] * 4)  # reading any of them would fail

    state = init_state({}, optax.identity(), KEY)
    state = state._replace(step=jnp.full((), 7, jnp.int32))
    loop = train_steps(state, step_fn, batches())

    assert taken == []
    assert next(loop)[0] == 8
    assert taken == [0]
    assert [done for done, _, _ in loop] == [9, 10]


def test_a_fresh_state_shares_no_array_so_that_it_can_be_donated():
    _, fresh = adamw_step()

    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(fresh().opt_state)]

    assert len(places) == len(set(places))
