"""The loss in chunks is the loss, without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.model.gpt import lm_logits
from gptjax.training.loss import (
    VOCAB_ALIGNMENT,
    cross_entropy_sum,
    from_chunks,
    fused_cross_entropy,
    pad_vocab,
    per_token_loss,
    to_chunks,
)

B, T, D, V = 2, 12, 16, 50
CONFIG = GPTConfig(vocab_size=V, vocab_multiple=16, n_layers=1, n_heads=1, d_model=D)


@pytest.fixture(autouse=True)
def _no_silent_casts():
    with jax.numpy_dtype_promotion("strict"):
        yield


def inputs(dtype=jnp.float32):
    """Hidden states, output table, targets and weights; some weights are 0."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(CONFIG.padded_vocab_size, D)), jnp.float32),
        jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32),
        jnp.asarray(rng.uniform(size=(B, T)).round() * rng.uniform(size=(B, T)), "f4"),
    )


def full(x_BTD, table_VD, target_BT, weight_BT):
    """The same sum from all logits at once."""
    logit_BTV = lm_logits(CONFIG, table_VD, x_BTD)
    return cross_entropy_sum(logit_BTV, target_BT, weight_BT)[0]


def chunked(chunk):
    def nats(x_BTD, table_VD, target_BT, weight_BT):
        return fused_cross_entropy(CONFIG, x_BTD, table_VD, target_BT, weight_BT, chunk)

    return nats


def with_gradients(nats, arrays):
    """Value, and gradients by hidden states, table and weights, scaled by 3."""
    scaled = lambda *arrays: 3 * nats(*arrays)  # noqa: E731
    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1, 3)))(*arrays)


@pytest.mark.fast
@pytest.mark.parametrize("chunk", [1, 5, 12, 1000])
def test_chunks_have_the_value_and_the_gradients_of_the_whole(chunk):
    arrays = inputs()

    result = with_gradients(chunked(chunk), arrays)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        result,
        with_gradients(full, arrays),
    )


def test_the_sides_that_a_gpu_is_given_change_nothing(monkeypatch):
    arrays = inputs()
    expected = with_gradients(full, arrays)

    monkeypatch.setattr("gptjax.training.loss.target_platform", lambda: "gpu")

    assert len(pad_vocab(arrays[1])) == VOCAB_ALIGNMENT > len(arrays[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        with_gradients(chunked(5), arrays),
        expected,
    )


def test_chunks_agree_with_the_whole_in_bfloat16():
    arrays = inputs(jnp.bfloat16)

    result = with_gradients(chunked(4), arrays)
    expected = with_gradients(full, arrays)

    assert result[0].dtype == jnp.float32
    assert [g.dtype for g in result[1]] == [g.dtype for g in expected[1]]
    # The same logits make the value; gradients are rounded to 8 bits at other places.
    np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)
    for a, b in zip(result[1], expected[1], strict=True):
        scale = float(jnp.abs(b).max())
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-2 * scale)


def test_the_value_is_the_same_where_no_gradient_is_asked_for():
    arrays = inputs()

    value, _ = with_gradients(chunked(4), arrays)

    np.testing.assert_allclose(3 * jax.jit(chunked(4))(*arrays), value, rtol=1e-6)


def test_the_loss_of_each_token_sums_to_the_loss():
    x_BTD, table_VD, target_BT, weight_BT = inputs()

    nats_BT = per_token_loss(CONFIG, x_BTD, table_VD, target_BT, 5)

    total = jnp.sum(nats_BT * weight_BT)
    np.testing.assert_allclose(total, full(x_BTD, table_VD, target_BT, weight_BT), rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("nats", [full, chunked(5)], ids=["full", "chunked"])
def test_what_has_weight_zero_changes_nothing(nats):
    """Neither the target of a padded place nor the hidden state there matters."""
    x_BTD, table_VD, target_BT, weight_BT = inputs()
    padded_BT = weight_BT == 0
    other_BTD = jnp.where(padded_BT[..., None], -x_BTD, x_BTD)
    other_BT = jnp.where(padded_BT, (target_BT + 1) % V, target_BT)

    total, grads = with_gradients(nats, (x_BTD, table_VD, target_BT, weight_BT))
    result, changed = with_gradients(nats, (other_BTD, table_VD, other_BT, weight_BT))

    assert jnp.any(padded_BT)
    assert result == total
    np.testing.assert_array_equal(grads[0][padded_BT], 0)
    np.testing.assert_allclose(changed[1], grads[1], atol=1e-5)


def test_rows_that_pad_the_vocabulary_have_no_gradient():
    _, (_, grad_VD, _) = with_gradients(chunked(5), inputs())

    np.testing.assert_array_equal(grad_VD[V:], 0)
    assert jnp.all(jnp.any(grad_VD[:V] != 0, axis=-1))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    nats, weight = cross_entropy_sum(
        jnp.zeros((1, 3, V)), jnp.zeros((1, 3), jnp.int32), jnp.array([[1.0, 1, 0]])
    )

    assert float(weight) == 2
    assert float(nats) == pytest.approx(2 * np.log(V))


def test_chunks_never_hold_all_logits():
    vocabulary, positions = 5_000, 512
    config = GPTConfig(vocab_size=vocabulary, n_layers=1, n_heads=1, d_model=D)
    shapes = (
        jax.ShapeDtypeStruct((B, positions, D), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, D), jnp.float32),
        jax.ShapeDtypeStruct((B, positions), jnp.int32),
        jax.ShapeDtypeStruct((B, positions), jnp.float32),
    )

    def temporary_bytes(nats):
        gradient = jax.jit(jax.value_and_grad(nats, argnums=(0, 1)))
        compiled = gradient.lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def at_once(x_BTD, table_VD, target_BT, weight_BT):
        logit_BTV = lm_logits(config, table_VD, x_BTD)
        return cross_entropy_sum(logit_BTV, target_BT, weight_BT)[0]

    def in_chunks(x_BTD, table_VD, target_BT, weight_BT):
        return fused_cross_entropy(config, x_BTD, table_VD, target_BT, weight_BT, 32)

    all_logits = 4 * B * positions * vocabulary
    assert temporary_bytes(in_chunks) < all_logits / 2
    assert temporary_bytes(at_once) > all_logits


@pytest.mark.parametrize(("chunk", "size"), [(1, 1), (5, 4), (6, 6), (12, 12), (99, 12)])
def test_chunks_are_equal_and_as_long_as_allowed(chunk, size):
    x_BT = jnp.arange(B * T).reshape(B, T)

    parts = to_chunks(x_BT, chunk)

    assert parts.shape == (T // size, B, size)
    np.testing.assert_array_equal(from_chunks(parts), x_BT)


def test_the_loss_may_be_mapped_over_models():
    x_BTD, *rest = inputs()
    nats = functools.partial(fused_cross_entropy, CONFIG, chunk_size=4)

    def gradient(x_BTD):
        return jax.grad(lambda x_BTD: nats(x_BTD, *rest))(x_BTD)

    mapped = jax.jit(jax.vmap(gradient))(jnp.stack([x_BTD, 2 * x_BTD]))

    np.testing.assert_allclose(mapped[1], jax.jit(gradient)(2 * x_BTD), atol=1e-5)
