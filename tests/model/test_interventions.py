"""What a caller adds to the residual stream: patching, steering, its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from tests.small_models import make_model

MODEL = make_model(n_layers=3)
CONFIG, T = MODEL.config, MODEL.config.context_length
ONE_BT, OTHER_BT = jax.random.randint(jax.random.key(2), (2, 1, T), 0, 257)
NOTHING_NBTD = jnp.zeros((CONFIG.n_layers, 1, T, CONFIG.d_model))


@functools.partial(jax.jit, static_argnums=0)
def run(config: GPTConfig, token_BT, added_NBTD):
    add = {"residual": added_NBTD}
    logits, kept = gptjax.apply(
        config, MODEL.params, token_BT, capture=("residual",), add=add
    )
    return logits, kept["residual"]


def test_adding_nothing_changes_nothing():
    logits, _ = run(CONFIG, ONE_BT, NOTHING_NBTD)

    plain = jax.jit(gptjax.apply, static_argnums=0)(CONFIG, MODEL.params, ONE_BT)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", range(CONFIG.n_layers))
def test_all_that_enters_one_layer_from_another_text_gives_that_texts_logits(n):
    own_logits, own_NBTD = run(CONFIG, ONE_BT, NOTHING_NBTD)
    other_logits, other_NBTD = run(CONFIG, OTHER_BT, NOTHING_NBTD)

    patch_NBTD = NOTHING_NBTD.at[n].set(other_NBTD[n] - own_NBTD[n])
    logits, seen_NBTD = run(CONFIG, ONE_BT, patch_NBTD)

    assert np.abs(own_logits - other_logits).max() > 0.1
    np.testing.assert_allclose(logits, other_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen_NBTD[n], other_NBTD[n], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen_NBTD[:n], own_NBTD[:n])


def test_what_is_added_at_a_position_changes_none_before_it():
    vector_D = jax.random.normal(jax.random.key(4), (CONFIG.d_model,))
    patch_NBTD = NOTHING_NBTD.at[1, 0, 4].set(vector_D)

    before, _ = run(CONFIG, ONE_BT, NOTHING_NBTD)
    after, _ = run(CONFIG, ONE_BT, patch_NBTD)

    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


def test_its_gradient_at_nothing_is_that_of_the_activations():
    def logit(added_NBTD):
        return run(CONFIG, ONE_BT, added_NBTD)[0][0, -1, 65]

    direction_NBTD = jax.random.normal(jax.random.key(3), NOTHING_NBTD.shape)
    slope = jnp.vdot(jax.grad(logit)(NOTHING_NBTD), direction_NBTD)

    step = 3e-3
    rise = logit(step * direction_NBTD) - logit(-step * direction_NBTD)
    np.testing.assert_allclose(rise / (2 * step), slope, rtol=2e-3)
