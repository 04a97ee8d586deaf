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
from gptjax.training import optimizer
from gptjax.tree import flatten_with_names

OPTIM = OptimConfig(peak_lr=1.0, warmup_steps=10, final_lr_fraction=0.1)


def rates(steps=100, **changes):
    schedule = optimizer.make_schedule(dataclasses.replace(OPTIM, **changes), steps)
    return np.asarray(schedule(np.arange(101)))[: steps + 1]


def updates_of(tx, params, gradients):
    """The updates of one step after the other, always of the same parameters."""
    state, found = tx.init(params), []
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        found.append(updates)
    return found


@pytest.mark.fast
@pytest.mark.parametrize("switch", [True, False])
def test_only_matrices_and_embeddings_decay(switch):
    config = GPTConfig(vocab_size=50, n_layers=2, n_heads=2, d_model=16)
    config = dataclasses.replace(config, qkv_bias=switch, tie_embeddings=switch)
    shapes = jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0)))

    mask = flatten_with_names(optimizer.decay_mask(shapes))

    for name, leaf in flatten_with_names(shapes).items():
        axes = leaf.ndim - name.startswith("blocks/")
        is_matrix = axes - name.endswith(("query/bias", "key/bias", "value/bias")) >= 2
        assert mask[name] is is_matrix, name
    with pytest.raises(ValueError, match="head/gain"):
        optimizer.decay_mask({"head": {"gain": jnp.zeros(2), "bias": jnp.zeros(2)}})


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
    np.testing.assert_allclose(optimizer.learning_rates(OPTIM, 100), cosine[:100], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"warmup_steps=10 .*\.steps=9"):
        optimizer.make_optimizer(OPTIM, 9)


@pytest.mark.fast
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_updates_are_those_of_optax(grad_clip):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradients = [jax.tree.map(lambda p, g=g: g * p, params) for g in (0.0, 0.1, 30.0, -3.0)]
    changes = {"warmup_steps": 4, "peak_lr": 0.1, "weight_decay": 0.5, "grad_clip": grad_clip}
    decay = {"kernel": True, "bias": False}
    expected = optax.chain(
        optax.clip_by_global_norm(grad_clip or jnp.inf),
        optax.adamw(lambda n: 0.025 * (n + 1), 0.9, 0.95, weight_decay=0.5, mask=decay),
    )

    tx = optimizer.make_optimizer(dataclasses.replace(OPTIM, **changes), 10)

    results = [updates_of(each, params, gradients) for each in (tx, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_clipping_uses_a_norm_that_is_known():
    clip = optimizer.clip_by_global_norm(1.0)
    clipped, _ = clip.update({"a": 3.0}, optax.EmptyState(), grad_norm=jnp.float32(2))
    assert clipped == {"a": 1.5}
