"""What decays, how the learning rate goes, and where the gradient is clipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config import GPTConfig, OptimConfig
from gptjax.errors import ConfigError
from gptjax.training.optimizer import clip_by_global_norm, decay_mask, make_optimizer, make_schedule
from gptjax.tree import flatten_with_names

OPTIM = OptimConfig(peak_lr=1.0, warmup_steps=10, final_lr_fraction=0.1)


def rates(steps=100, **changes):
    schedule = make_schedule(dataclasses.replace(OPTIM, **changes), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def updated(optim, params, *gradients, steps=10):
    """The parameters after one update for each gradient."""
    optimizer = make_optimizer(optim, steps)
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.fast
@pytest.mark.parametrize("switch", [True, False])
def test_matrices_and_embeddings_decay_and_nothing_else_does(switch):
    config = GPTConfig(vocab_size=50, n_layers=2, n_heads=2, d_model=16)
    config = dataclasses.replace(config, qkv_bias=switch, tie_embeddings=switch)
    shapes = jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0)))

    mask = flatten_with_names(decay_mask(shapes))

    for name, leaf in flatten_with_names(shapes).items():
        axes = leaf.ndim - name.startswith("blocks/")
        matrix = axes - name.endswith(("query/bias", "key/bias", "value/bias")) >= 2
        assert mask[name] is matrix, name


def test_a_tree_without_some_kinds_of_parameters_has_a_mask_too():
    mask = decay_mask({"head": {"kernel": jnp.zeros((2, 2))}})

    assert mask == {"head": {"kernel": True}}


def test_a_parameter_of_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"head/gain .* exactly one rule"):
        decay_mask({"head": {"gain": jnp.zeros(2), "bias": jnp.zeros(2)}})


@pytest.mark.fast
@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_the_warm_up_is_linear_and_reaches_the_peak(schedule):
    rate = rates(schedule=schedule)

    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert max(rate) == rate[9] == rate[10] == 1.0


def test_cosine_ends_at_the_final_rate_and_passes_its_middle_halfway():
    rate = rates(schedule="cosine")

    assert rate[55] == pytest.approx((1 + 0.1) / 2)
    assert rate[100] == pytest.approx(0.1)
    assert np.all(np.diff(rate[10:]) < 0)


def test_constant_stays_at_the_peak():
    np.testing.assert_array_equal(rates(schedule="constant")[9:], 1.0)


def test_wsd_is_constant_and_then_linear_to_the_final_rate():
    rate = rates(schedule="wsd")

    np.testing.assert_array_equal(rate[9:81], 1.0)
    np.testing.assert_allclose(np.diff(rate[80:]), -0.9 / 20, rtol=1e-4)
    assert rate[100] == pytest.approx(0.1)


@settings(deadline=None, max_examples=30)
@given(
    schedule=st.sampled_from(["cosine", "constant", "wsd"]),
    steps=st.integers(1, 20),
    warmup=st.integers(0, 20),
)
def test_no_update_of_any_run_has_rate_zero_or_above_the_peak(schedule, steps, warmup):
    optim = dataclasses.replace(OPTIM, schedule=schedule, warmup_steps=min(warmup, steps))

    rate = make_schedule(optim, steps)(jnp.arange(20))[:steps]  # one shape to compile

    assert np.all(np.asarray(rate) > 0)
    assert np.all(np.asarray(rate) <= 1 + 1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps=10 .*\.steps=9"):
        make_optimizer(OPTIM, 9)


def test_only_the_direction_of_a_long_gradient_counts():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    optim = dataclasses.replace(OPTIM, warmup_steps=0, grad_clip=1.0)
    first = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.array([0.0, 4.0])}
    second = jax.tree.map(lambda g: 0.05 * g, first)

    longer = jax.tree.map(lambda g: 1e3 * g, first)
    results = [updated(optim, params, grads, second) for grads in (first, longer)]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_a_norm_that_is_known_is_the_one_that_counts():
    clipping, grads = clip_by_global_norm(1.0), {"bias": jnp.array([3.0, 4.0])}

    found = [
        float(clipping.update(grads, optax.EmptyState(), **known)[0]["bias"][1])
        for known in ({}, {"grad_norm": jnp.float32(5)}, {"grad_norm": jnp.float32(8)})
    ]

    np.testing.assert_allclose(found, [0.8, 0.8, 0.5], rtol=1e-6)


def test_without_clipping_the_length_of_a_gradient_counts():
    params = {"bias": jnp.zeros(2)}
    optim = dataclasses.replace(OPTIM, warmup_steps=0, grad_clip=0.0)
    second = {"bias": jnp.array([0.1, 0.2])}

    results = [
        updated(optim, params, {"bias": scale * jnp.ones(2)}, second) for scale in (1.0, 1e3)
    ]

    assert jnp.all(jnp.abs(results[0]["bias"] - results[1]["bias"]) > 1e-3)


def test_decay_shrinks_by_rate_times_weight_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optim = OptimConfig(peak_lr=0.01, warmup_steps=0, weight_decay=0.5, schedule="constant")

    result = updated(optim, params, jax.tree.map(jnp.zeros_like, params))

    np.testing.assert_allclose(result["kernel"], 1 - 0.01 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(result["bias"], 1)


def test_the_first_update_of_adam_has_the_length_of_the_learning_rate():
    params = {"bias": jnp.zeros(3)}
    optim = dataclasses.replace(OPTIM, warmup_steps=4, peak_lr=0.1)

    result = updated(optim, params, {"bias": jnp.array([-3.0, 1e-4, 5.0])})

    np.testing.assert_allclose(result["bias"], [0.025, -0.025, -0.025], rtol=1e-2)


@pytest.mark.fast
@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 30.0])
def test_clipping_is_that_of_optax_but_for_its_order(length):
    grads = {"a": jnp.array([0.6, 0.0]) * length, "b": jnp.array([0.8]) * length}

    ours, theirs = (
        make(1.0).update(grads, optax.EmptyState())[0]
        for make in (clip_by_global_norm, optax.clip_by_global_norm)
    )

    for one, other in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=3e-7)
