"""Reference attention: softmax(Q K^T / sqrt(K)) V; O(T·S) memory.

The formula is eq. 1 of Vaswani et al. 2017.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptjax.model.attention.mask import AttentionMask, KeyValueHeads, QueryHeads, materialize_mask
from gptjax.model.attention.spec import AttentionSpec, dropout_unsupported

_QueriesHeadsFirst = Float[Array, "B H T K"]
_KeysHeadsFirst = Float[Array, "B H S K"]
_MaskArray = Bool[Array, "B T S"]


def attention_weights(
    query_BHTK: _QueriesHeadsFirst, key_BHSK: _KeysHeadsFirst, mask_BTS: _MaskArray
) -> Float[Array, "B H T S"]:
    """Computes attention weights: a float32 softmax over keys, 0 where masked."""
    score_BHTS = jnp.einsum(
        "BHTK,BHSK->BHTS", query_BHTK, key_BHSK, preferred_element_type=jnp.float32
    )
    score_BHTS *= query_BHTK.shape[-1] ** -0.5
    mask_value = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BHTS, mask_value))


def attend_masked(
    query_BHTK: _QueriesHeadsFirst,
    key_BHSK: _KeysHeadsFirst,
    value_BHSK: _KeysHeadsFirst,
    mask_BTS: _MaskArray,
    edit_weights: Callable[[Array], Array] | None = None,
) -> _QueriesHeadsFirst:
    """Computes masked attention; heads come before positions, the fast layout on CPU.

    Args:
        query_BHTK: queries.
        key_BHSK: keys.
        value_BHSK: values.
        mask_BTS: True where a query attends to a key.
        edit_weights: function of the attention weights, e.g. dropout.
    """
    weight_BHTS = attention_weights(query_BHTK, key_BHSK, mask_BTS)
    if edit_weights is not None:
        weight_BHTS = edit_weights(weight_BHTS)
    weight_BHTS = weight_BHTS.astype(value_BHSK.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", weight_BHTS, value_BHSK)


def reference_attention(
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
    edit_weights: Callable[[Array], Array] | None = None,
) -> QueryHeads:
    """Computes attention by the formula, all weights at once."""
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
    query_BHTK, key_BHSK, value_BHSK = (
        jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    out_BHTK = attend_masked(query_BHTK, key_BHSK, value_BHSK, mask_BTS, edit_weights)
    return jnp.swapaxes(out_BHTK, 1, 2)


NUM_CHUNKS = 4  # of queries; with more, smaller matmuls cost more than skipping saves
MIN_CHUNK = 32  # queries in a chunk
MAX_UNCHUNKED = 64  # queries; up to here, chunks cost more than they save


def chunked_causal_attention(
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
    edit_weights: Callable[[Array], Array] | None = None,
) -> QueryHeads:
    """Computes the same as `reference_attention`, without most of the masked keys."""
    queries, keys = query_BTHK.shape[1], key_BSHK.shape[1]
    chunk = queries if queries <= MAX_UNCHUNKED else max(MIN_CHUNK, -(-queries // NUM_CHUNKS))
    skip_masked = mask.causal and mask.query_position_BT is None
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
    query_BHTK, key_BHSK, value_BHSK = (
        jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    chunks = []
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        num_keys = end if skip_masked else keys
        chunks.append(
            attend_masked(
                query_BHTK[:, :, start:end],
                key_BHSK[:, :, :num_keys],
                value_BHSK[:, :, :num_keys],
                mask_BTS[:, start:end, :num_keys],
                edit_weights,
            )
        )
    return jnp.swapaxes(jnp.concatenate(chunks, axis=2), 1, 2)


def xla_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention with JAX's own implementation."""
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
    return jax.nn.dot_product_attention(
        query_BTHK, key_BSHK, value_BSHK, mask=mask_BTS[:, None], implementation="xla"
    )


def xla_unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the XLA backend does not support a call, or ""."""
    return dropout_unsupported("xla") if spec.dropout else ""
