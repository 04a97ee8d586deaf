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
    with pytest.raises(ValueError, match="head/gain"):
        decay_mask({"head": {"gain": jnp.zeros(2), "bias": jnp.zeros(2)}})


def test_schedules_warm_up_linearly_and_end_at_their_final_rate():
    for schedule, last in {"constant": 1.0, "cosine": 0.1, "wsd": 0.1}.items():
        rate = rates(schedule=schedule)
        np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
        assert rate.max() == rate[9] == rate[10] == 1.0
        assert rate[100] == pytest.approx(last)
        for steps, warmup in ((1, 0), (1, 1), (3, 3), (20, 19)):  # none is wasted
            rate = rates(steps, schedule=schedule, warmup_steps=warmup)[:-1]
            assert np.all((rate > 0) & (rate <= 1 + 1e-6))
    cosine, wsd = rates(schedule="cosine"), rates(schedule="wsd")
    assert cosine[55] == pytest.approx((1 + 0.1) / 2)
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
        expected, _ = optax.clip_by_global_norm(1.0).update(grads, empty)
        for norm in ({}, {"grad_norm": jnp.float32(length)}):
            clipped, _ = clip.update(grads, empty, **norm)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), clipped, expected
            )

    for grad_clip in (1.0, 0.0):  # AdamW's second step depends on the size of the first
        optim = dataclasses.replace(OPTIM, warmup_steps=0, grad_clip=grad_clip)
        small, large = (
            update(optim, {"bias": jnp.zeros(2)}, *({"bias": jnp.array(g)} for g in gradients))
            for gradients in (([3.0, 4.0], [0.1, 0.2]), ([3e3, 4e3], [0.1, 0.2]))
        )
        assert np.allclose(small["bias"], large["bias"], rtol=1e-3) == bool(grad_clip)


def test_an_update_is_that_of_adamw():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradients = [jax.tree.map(lambda p, g=g: g * p, params) for g in (1.0, -3.0)]
    optim = dataclasses.replace(OPTIM, warmup_steps=4, peak_lr=0.1, weight_decay=0.5)

    found = update(dataclasses.replace(optim, grad_clip=0.0), params, *gradients)

    # Rates 0.025 and 0.05, decay of the kernel only, betas 0.9 and 0.95.
    moments = [(b + power) * (1 - b) / (1 - b**2) for b, power in ((0.9, -3), (0.95, 9))]
    second = 0.05 * moments[0] / moments[1] ** 0.5
    np.testing.assert_allclose(found["bias"], 1 - 0.025 - second, rtol=1e-5)
    kernel = (1 - 0.025 * (1 + 0.5)) * (1 - 0.05 * 0.5) - second
    np.testing.assert_allclose(found["kernel"], kernel, rtol=1e-5)
