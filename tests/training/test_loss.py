"""The cross-entropy in chunks equals that of all logits, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.model.gpt import lm_logits
from gptjax.training import loss
from tests.small_models import make_model

B, T, D, V = 2, 12, 16, 50
CONFIG = GPTConfig(vocab_size=V, vocab_multiple=16, n_layers=1, n_heads=1, d_model=D)


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def make_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(CONFIG.padded_vocab_size, D)), jnp.float32),
        jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32),
        jnp.asarray(rng.uniform(size=(B, T)).round() * rng.uniform(size=(B, T)), "f4"),
    )


def full_loss(x_BTD, table_VD, target_BT, weight_BT):
    return 3 * loss.cross_entropy_sum(lm_logits(CONFIG, table_VD, x_BTD), target_BT, weight_BT)[0]


def chunked_loss(*arrays):
    return 3 * loss.fused_cross_entropy(CONFIG, *arrays, 5)


def value_and_grads(loss_fn, arrays):
    """Value, and gradients by hidden states, unembedding and weights."""
    return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1, 3)))(*arrays)


# Gradients in bfloat16 are rounded to 8 bits at other places.
@pytest.mark.fast
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_chunks_have_the_value_and_gradients_of_the_whole(monkeypatch, dtype, tolerance):
    arrays = make_inputs(dtype)
    value, grads = value_and_grads(full_loss, arrays)

    for platform in ("cpu", "gpu"):
        monkeypatch.setattr("gptjax.training.loss.target_platform", lambda name=platform: name)
        chunked_value, chunked_grads = value_and_grads(chunked_loss, arrays)
        assert chunked_value.dtype == jnp.float32
        np.testing.assert_allclose(chunked_value, value, rtol=1e-5)
        for grad, expected in zip(chunked_grads, grads, strict=True):
            assert grad.dtype == expected.dtype
            atol = tolerance * float(jnp.abs(expected).max())
            np.testing.assert_allclose(grad.astype("f4"), expected.astype("f4"), atol=atol)
    assert len(loss.pad_vocab(arrays[1])) == loss.VOCAB_ALIGNMENT > len(arrays[1])
    # Without a gradient, and for each token.
    np.testing.assert_allclose(jax.jit(chunked_loss)(*arrays), value, rtol=1e-6)
    loss_BT = loss.per_token_loss(CONFIG, *arrays[:3], 5)
    np.testing.assert_allclose(3 * jnp.sum(loss_BT * arrays[3]), value, rtol=1e-6)
    # Rows that pad the vocabulary have no gradient.
    np.testing.assert_array_equal(grads[1][V:], 0)
    assert jnp.all(jnp.any(grads[1][:V] != 0, axis=-1))


def test_other_documents_of_a_row_and_weight_zero_change_nothing_only_with_segment_ids():
    model, tokens = make_model(), np.array([[5, 6, 7, 8, 9, 10], [3, 3, 3, 8, 9, 10]])
    batch = {
        **{"tokens": tokens, "targets": tokens + 1},
        "loss_weights": np.array([[0, 0, 0, 1, 1, 1.0]] * 2, np.float32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2]] * 2),
        "positions": np.array([[0, 1, 2, 0, 1, 2]] * 2),
    }
    rows = [{name: leaf[n : n + 1] for name, leaf in batch.items()} for n in (0, 1)]

    for use_segment_ids in (True, False):
        loss_fn = jax.jit(loss.make_lm_loss_fn(model.config, 4, use_segment_ids))
        (one, weight), (other, _) = (loss_fn(model.params, row, None) for row in rows)
        assert (float(one) == pytest.approx(float(other), rel=1e-5)) == use_segment_ids
        assert weight == 3


def test_chunks_are_as_long_as_allowed_and_never_hold_all_logits():
    x_BT = jnp.arange(B * T).reshape(B, T)
    for chunk_size, size in {1: 1, 5: 4, 6: 6, 99: 12}.items():
        chunks = loss.to_chunks(x_BT, chunk_size)
        assert chunks.shape == (T // size, B, size)
        np.testing.assert_array_equal(loss.from_chunks(chunks), x_BT)

    vocabulary, positions = 5_000, 512
    config = GPTConfig(vocab_size=vocabulary, n_layers=1, n_heads=1, d_model=D)
    shapes = {(B, positions, D): "f4", (vocabulary, D): "f4", (B, positions): "i4"}
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes.items()]
    weight = jax.ShapeDtypeStruct((B, positions), jnp.float32)
    loss_fn = lambda *arrays: loss.fused_cross_entropy(config, *arrays, 32)  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss_fn, (0, 1))).lower(*structs, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * positions * vocabulary / 2
