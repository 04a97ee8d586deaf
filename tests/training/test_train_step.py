"""The train step: accumulation, skipped steps, determinism, exact resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.config import GPTConfig, OptimConfig
from gptjax.errors import ConfigError
from gptjax.model.gpt import hidden_states, unembedding_matrix
from gptjax.training.loss import fused_cross_entropy
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import Metrics, init_state, make_train_step, train_steps

B, T, V = 4, 8, 50
SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "dtype": "float32"}
TINY = GPTConfig(vocab_size=V, context_length=T, **SHAPE)
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default


@functools.cache
def initial_params():
    """Parameters on the host, since a step may consume its own."""
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
    """A compiled step, and a function that makes its initial state."""
    optim = OptimConfig(peak_lr=3e-2, warmup_steps=2, schedule="constant")
    optimizer = make_optimizer(optim, 100)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)

    def make_state():
        return init_state(jax.tree.map(jnp.array, initial_params()), optimizer, jnp.copy(KEY))

    return step_fn, make_state


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
        state, metrics = step_fn(init_state(initial_params(), optimizer, KEY), batch)
        return jax.tree.map(jnp.subtract, state.params, initial_params()), metrics

    gradient, expected = after(1)
    for groups in (2, 4):
        parts, metrics = after(groups)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, parts)
        np.testing.assert_allclose(metrics, expected, rtol=1e-6)
        assert float(metrics.tokens) == UNEVEN.sum()


def test_micro_batches_take_every_nth_row_and_have_their_own_keys():
    def record(params, batch, key):
        jax.debug.callback(lambda *args: calls.append(args), batch, jax.random.bits(key))
        return 0 * params["bias"], jnp.sum(batch)

    calls, optimizer = [], optax.sgd(1.0)
    state = init_state({"bias": jnp.zeros(())}, optimizer, KEY)

    jax.jit(make_train_step(record, optimizer, 2))(state, jnp.arange(6))
    jax.effects_barrier()

    assert [list(batch) for batch, _ in calls] == [[0, 2, 4], [1, 3, 5]]
    assert len({int(bits) for _, bits in calls}) == 2


@pytest.mark.fast
def test_a_non_finite_step_changes_only_the_counts():
    step_fn, make_state = adamw_step()
    state, _ = step_fn(make_state(), batch_at(0))

    for n, bad in enumerate((np.nan, np.inf), 1):
        weight_BT = np.ones((B, T), np.float32)
        weight_BT[1, 2] = bad
        before = jax.tree.map(jnp.copy, state)
        state, metrics = step_fn(state, batch_at(1, weight_BT))
        assert not bool(metrics.applied)
        assert_equal((state.params, state.opt_state), (before.params, before.opt_state))
        assert (int(state.step), int(state.num_skipped)) == (1 + n, n)
    state, metrics = step_fn(state, batch_at(0, np.zeros((B, T), np.float32)))
    assert bool(metrics.applied)  # a batch without weight has loss 0
    assert float(metrics.loss) == 0
    state, metrics = step_fn(state, batch_at(2))
    assert bool(metrics.applied)
    assert jnp.any(state.params["final_norm"]["bias"] != before.params["final_norm"]["bias"])
    assert jax.tree.all(jax.tree.map(lambda p: jnp.all(jnp.isfinite(p)), state.params))


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped():
    def root(params, batch, key):
        return jnp.sqrt(params["bias"]) * batch, batch

    optimizer = optax.sgd(1.0)
    state = init_state({"bias": jnp.zeros(())}, optimizer, KEY)

    state, metrics = jax.jit(make_train_step(root, optimizer))(state, jnp.ones(()))

    assert jnp.isfinite(metrics.loss)
    assert not bool(metrics.applied)
    assert (float(state.params["bias"]), int(state.num_skipped)) == (0, 1)


def test_a_gradient_norm_above_the_threshold_is_skipped():
    def linear(params, batch, key):
        return params["bias"] * batch, jnp.float32(1)

    optimizer = optax.sgd(1.0)
    step_fn = jax.jit(make_train_step(linear, optimizer))
    state = init_state({"bias": jnp.zeros(())}, optimizer, KEY)

    for threshold, applied in ((2.9, False), (3.0, True)):
        after, metrics = step_fn(state, jnp.float32(3), threshold)
        assert bool(metrics.applied) == applied
        assert (float(after.params["bias"]), int(after.num_skipped)) == (-3 * applied, not applied)


def test_a_loss_function_must_return_two_scalars():
    optimizer = optax.sgd(1.0)
    state = init_state({"bias": jnp.zeros(())}, optimizer, KEY)

    for result in (jnp.zeros(()), (jnp.zeros(2), jnp.ones(()))):
        step_fn = make_train_step(lambda params, batch, key, x=result: x, optimizer)
        with pytest.raises(ConfigError, match="loss_fn"):
            step_fn(state, jnp.ones(2))


@pytest.mark.fast
def test_ten_steps_overfit_one_batch():
    step_fn, make_state = adamw_step()

    batches = [batch_at(0)] * 60
    losses = [float(x.loss) for _, _, x in train_steps(make_state(), step_fn, batches)]

    assert losses[0] == pytest.approx(np.log(V), rel=0.05)
    assert losses[10] < losses[0] / 2
    assert losses[-1] < 0.1


def test_the_state_is_updated_in_place():
    step_fn, make_state = adamw_step()
    state = make_state()
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.params)}
    moments = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.opt_state)]
    assert len(moments) == len(set(moments))  # shared arrays cannot be donated

    after, _ = step_fn(state, batch_at(0))

    arrays = jax.tree.leaves((state.params, state.opt_state, state.step))
    assert all(array.is_deleted() for array in arrays)
    reused = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(after.params)}
    assert len(pointers & reused) > len(pointers) / 2


def run(state, first, stop):
    """The state at the end, and the metrics of every step."""
    step_fn, _ = adamw_step()
    all_metrics = []
    for _, state, metrics in train_steps(state, step_fn, map(batch_at, range(first, stop))):  # noqa: B007, B020
        all_metrics.append(metrics)
    return state, all_metrics


@pytest.mark.fast
def test_a_run_is_deterministic_and_can_be_resumed_to_the_last_bit():
    _, make_state = adamw_step()

    state, metrics = run(make_state(), 0, 6)
    half_state, early = run(make_state(), 0, 3)
    resumed_state, late = run(jax.tree.map(jnp.copy, half_state), 3, 6)

    assert_equal((state, metrics), (resumed_state, early + late))


def test_each_step_has_its_own_dropout_mask():
    config = dataclasses.replace(TINY, dropout=0.5)
    optimizer = optax.sgd(0.0)  # the parameters stay, so only the key differs
    step_fn = jax.jit(make_train_step(functools.partial(loss_fn, config=config), optimizer))
    state = init_state(initial_params(), optimizer, KEY)

    norms = {float(x.grad_norm) for _, _, x in train_steps(state, step_fn, [batch_at(0)] * 3)}

    assert len(norms) == 3


def test_the_loop_takes_a_batch_only_on_demand_and_reads_no_metric():
    taken = []

    def batches():
        for n in range(3):
            taken.append(n)
            yield n

    def step_fn(state, batch):
        return state, Metrics(*[object()] * 4)  # reading any of them would fail

    state = init_state({}, optax.identity(), KEY)
    loop = train_steps(state._replace(step=jnp.int32(7)), step_fn, batches())

    assert taken == []
    assert next(loop)[0] == 8
    assert taken == [0]
    assert [step for step, _, _ in loop] == [9, 10]
