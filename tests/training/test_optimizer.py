"""Weight decay, learning-rate schedules and gradient clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.config import GPTConfig, OptimConfig
from gptjax.errors import ConfigError
from gptjax.training.optimizer import (
    clip_by_global_norm,
    decay_mask,
    learning_rates,
    make_optimizer,
    make_schedule,
)
from gptjax.tree import flatten_with_names

OPTIM = OptimConfig(peak_lr=1.0, warmup_steps=10, final_lr_fraction=0.1)


def rates(steps=100, **changes):
    schedule = make_schedule(dataclasses.replace(OPTIM, **changes), steps)
    return np.asarray(schedule(np.arange(101)))[: steps + 1]


def update(optim, params, *gradients):
    """Parameters after one update for each gradient."""
    optimizer = make_optimizer(optim, 10)
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.fast
@pytest.mark.parametrize("switch", [True, False])
def test_only_matrices_and_embeddings_decay(switch):
    config = GPTConfig(vocab_size=50, n_layers=2, n_heads=2, d_model=16)
    config = dataclasses.replace(config, qkv_bias=switch, tie_embeddings=switch)
    shapes = jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0)))

    mask = flatten_with_names(decay_mask(shapes))

    for name, leaf in flatten_with_names(shapes).items():
        axes = leaf.ndim - name.startswith("blocks/")
        is_matrix = axes - name.endswith(("query/bias", "key/bias", "value/bias")) >= 2
        assert mask[name] is is_matrix, name
    assert decay_mask({"head": {"kernel": jnp.zeros((2, 2))}}) == {"head": {"kernel": True}}
    with pytest.raises(ValueError, match="head/gain"):
        decay_mask({"head": {"gain": jnp.zeros(2), "bias": jnp.zeros(2)}})


@pytest.mark.fast
def test_schedules_warm_up_linearly_and_end_at_their_final_rate():
    for schedule in ("cosine", "constant", "wsd"):
        rate = rates(schedule=schedule)
        np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
        assert rate.max() == rate[9] == rate[10] == 1.0
        assert rate[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        for steps, warmup in ((1, 0), (1, 1), (3, 3), (4, 1), (20, 19)):  # none is wasted
            rate = rates(steps, schedule=schedule, warmup_steps=warmup)[:-1]
            assert np.all((rate > 0) & (rate <= 1 + 1e-6))
    np.testing.assert_array_equal(rates(schedule="constant")[9:], 1.0)
    cosine, wsd = rates(schedule="cosine"), rates(schedule="wsd")
    assert cosine[55] == pytest.approx((1 + 0.1) / 2)
    assert np.all(np.diff(cosine[10:]) < 0)
    np.testing.assert_array_equal(wsd[9:81], 1.0)
    np.testing.assert_allclose(np.diff(wsd[80:]), -0.9 / 20, rtol=1e-4)
    np.testing.assert_allclose(learning_rates(OPTIM, 100), cosine[:100], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"warmup_steps=10 .*\.steps=9"):
        make_optimizer(OPTIM, 9)


@pytest.mark.fast
def test_clipping_agrees_with_optax_and_is_part_of_the_optimizer():
    clip, empty = clip_by_global_norm(1.0), optax.EmptyState()
    for length in (0.0, 0.5, 1.0, 30.0):
        grads = {"a": jnp.array([0.6, 0.0]) * length, "b": jnp.array([0.8]) * length}
        clipped, _ = clip.update(grads, empty)
        expected, _ = optax.clip_by_global_norm(1.0).update(grads, empty)
        with_norm, _ = clip.update(grads, empty, grad_norm=jnp.float32(2 * length))
        for name in grads:
            np.testing.assert_allclose(clipped[name], expected[name], rtol=3e-7)
            factor = min(1, 1 / max(2 * length, 1e-9))  # of the norm that is passed in
            np.testing.assert_allclose(with_norm[name], factor * grads[name], rtol=1e-6)

    def results(grad_clip):
        optim = dataclasses.replace(OPTIM, warmup_steps=0, grad_clip=grad_clip)
        first = [{"bias": jnp.array([3.0, 4.0]) * scale} for scale in (1.0, 1e3)]
        second = {"bias": jnp.array([0.1, 0.2])}
        return [update(optim, {"bias": jnp.zeros(2)}, grads, second)["bias"] for grads in first]

    np.testing.assert_allclose(*results(1.0), rtol=1e-5)
    assert jnp.all(jnp.abs(jnp.subtract(*results(0.0))) > 1e-3)


def test_an_update_is_that_of_adamw():
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    ones = jax.tree.map(jnp.ones_like, zero)
    optim = OptimConfig(peak_lr=0.01, warmup_steps=0, weight_decay=0.5, schedule="constant")

    decayed = update(optim, ones, zero)

    np.testing.assert_allclose(decayed["kernel"], 1 - 0.01 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(decayed["bias"], 1)
    optim = dataclasses.replace(OPTIM, warmup_steps=4, peak_lr=0.1)
    first = update(optim, {"bias": jnp.zeros(3)}, {"bias": jnp.array([-3.0, 1e-4, 5.0])})
    np.testing.assert_allclose(first["bias"], [0.025, -0.025, -0.025], rtol=1e-2)
    second = update(optim, ones, ones, jax.tree.map(jnp.negative, ones))["bias"]
    moment = [(0.9 * 0.1 - 0.1) / (1 - 0.9**2), (1 - 0.95) * (0.95 + 1) / (1 - 0.95**2)]
    expected = 1 - 0.025 - 0.05 * moment[0] / moment[1] ** 0.5
    np.testing.assert_allclose(second, expected, rtol=1e-5)
