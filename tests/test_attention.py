"""Every backend computes the attention that three nested loops compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.attention import (
    BACKENDS,
    attention_weights,
    chosen_backend,
    plain,
    visible,
    xla,
)
from gptjax.errors import ConfigError

B, T, H, K = 3, 8, 2, 4
ROW = jnp.arange(T)[None].repeat(B, 0)
PACKED = jnp.array([[0] * 8, [0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 1]])


def masks():
    """Causal rows, packed rows, and a few queries at other slots of each row."""
    slot_BT = jnp.array([[0, 1], [3, 4], [6, 7]])
    return {
        "causal": visible(ROW, T),
        "packed": visible(ROW, T, PACKED, PACKED),
        "slots": visible(slot_BT, T),
    }


def inputs(mask_BTS, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    queries = mask_BTS.shape[1]
    query_BTHK = jax.random.normal(keys[0], (B, queries, H, K), dtype)
    key_BSHK = jax.random.normal(keys[1], (B, T, H, K), dtype)
    return query_BTHK, key_BSHK, jax.random.normal(keys[2], (B, T, H, K), dtype)


def looped(query_BTHK, key_BSHK, value_BSHK, mask_BTS):
    """Attention one query at a time in float64, from the keys that it may see."""
    query_BTHK, key_BSHK, value_BSHK = (
        np.asarray(x, np.float64) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    mixed_BTHK = np.zeros(query_BTHK.shape)
    for b, t, h in np.ndindex(query_BTHK.shape[:3]):
        seen = np.flatnonzero(mask_BTS[b, t])
        score = key_BSHK[b, seen, h] @ query_BTHK[b, t, h] / np.sqrt(K)
        weight = np.exp(score - score.max())
        mixed_BTHK[b, t, h] = weight / weight.sum() @ value_BSHK[b, seen, h]
    return mixed_BTHK


@pytest.mark.fast
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_three_nested_loops(backend, kind):
    mask_BTS = masks()[kind]
    arrays = inputs(mask_BTS)

    mixed_BTHK = jax.jit(BACKENDS[backend])(*arrays, mask_BTS)

    expected = looped(*arrays, np.asarray(mask_BTS))
    np.testing.assert_allclose(mixed_BTHK, expected, atol=2e-6)


@pytest.mark.parametrize("kind", masks())
def test_backends_agree_in_value_and_gradient(kind):
    mask_BTS = masks()[kind]
    arrays = inputs(mask_BTS)

    def total(backend):
        return lambda *arrays: jnp.mean(jnp.sin(backend(*arrays, mask_BTS)))

    results = [
        jax.jit(jax.value_and_grad(total(backend), argnums=(0, 1, 2)))(*arrays)
        for backend in (plain, xla)
    ]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *results)


@pytest.mark.parametrize("kind", masks())
def test_backends_agree_in_bfloat16(kind):
    mask_BTS = masks()[kind]
    arrays = inputs(mask_BTS, jnp.bfloat16)

    mixed, other = (jax.jit(f)(*arrays, mask_BTS) for f in (plain, xla))

    assert mixed.dtype == other.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: weights and their sum of values are rounded once each.
    expected = looped(*arrays, np.asarray(mask_BTS))
    for result in (mixed, other):
        np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.parametrize("kind", masks())
def test_weights_sum_to_one_and_are_exactly_zero_where_masked(kind):
    mask_BTS = masks()[kind]
    query_BTHK, key_BSHK, _ = inputs(mask_BTS)

    weight_BHTS = jax.jit(attention_weights)(query_BTHK, key_BSHK, mask_BTS)

    masked = np.broadcast_to(~np.asarray(mask_BTS)[:, None], weight_BHTS.shape)
    np.testing.assert_array_equal(np.asarray(weight_BHTS)[masked], 0)
    assert np.all(np.asarray(weight_BHTS)[~masked] > 0)
    np.testing.assert_allclose(weight_BHTS.sum(-1), 1, atol=1e-6)


def test_scores_too_large_for_exp_do_not_overflow():
    mask_BTS = masks()["causal"]
    query_BTHK, key_BSHK, value_BSHK = inputs(mask_BTS)

    mixed_BTHK = plain(1e4 * query_BTHK, key_BSHK, value_BSHK, mask_BTS)

    assert jnp.all(jnp.isfinite(mixed_BTHK))


@pytest.mark.fast
def test_a_query_sees_itself_and_what_came_before_it_in_its_document():
    slots, segments = jnp.arange(4)[None], jnp.array([[0, 0, 1, 1]])

    mask_TS = visible(slots, 4, segments, segments)[0].astype(int)

    np.testing.assert_array_equal(
        mask_TS, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    )


def test_every_query_sees_itself_whatever_the_segments():
    segment_BT = jax.random.randint(jax.random.key(0), (B, T), 0, 3)

    mask_BTS = visible(ROW, T, segment_BT, segment_BT)

    assert jnp.all(jnp.diagonal(mask_BTS, axis1=1, axis2=2))


def test_plain_applies_dropout_to_the_normalised_weights():
    mask_BTS = masks()["causal"]
    arrays = inputs(mask_BTS)

    doubled = plain(*arrays, mask_BTS, lambda weight_BHTS: 2 * weight_BHTS)

    np.testing.assert_allclose(doubled, 2 * plain(*arrays, mask_BTS), rtol=1e-6)


def test_a_backend_that_cannot_drop_weights_says_so():
    mask_BTS = masks()["causal"]

    with pytest.raises(ConfigError, match=r"model.attention='xla' cannot drop"):
        xla(*inputs(mask_BTS), mask_BTS, lambda x: x)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_never_chooses_a_backend_that_cannot_honour_dropout(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)

    assert chosen_backend("auto", dropout=0.1) == "plain"
    assert chosen_backend("auto") == ("plain" if platform == "cpu" else "xla")
    assert chosen_backend("xla", dropout=0.1) == "xla"
