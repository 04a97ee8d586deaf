"""Attention by the formula softmax(Q K^T / sqrt(K)) V; O(T·S) memory.

The formula is eq. 1 of Vaswani et al. 2017. Heads come before positions, the fast
layout on CPU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptjax.model.attention.mask import (
    AttentionMask,
    KeysHeadsFirst,
    KeyValueHeads,
    QueriesHeadsFirst,
    QueryHeads,
    materialize_mask,
)

EditWeights = Callable[[Array], Array]  # of the attention weights, e.g. dropout
NUM_CHUNKS = 4  # of queries; with more, smaller matmuls cost more than skipping saves
MIN_CHUNK = 32  # queries in a chunk
MAX_UNCHUNKED = 64  # queries; up to here, chunks cost more than they save


def attention_weights(
    query_BHTK: QueriesHeadsFirst, key_BHSK: KeysHeadsFirst, mask_BTS: Bool[Array, "B T S"]
) -> Float[Array, "B H T S"]:
    """Computes attention weights: a float32 softmax over keys, 0 where masked."""
    score_BHTS = jnp.einsum(
        "BHTK,BHSK->BHTS", query_BHTK, key_BHSK, preferred_element_type=jnp.float32
    )
    score_BHTS *= query_BHTK.shape[-1] ** -0.5
    mask_value = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BHTS, mask_value))


def reference_attention(
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
    edit_weights: EditWeights | None = None,
    num_chunks: int = 1,
) -> QueryHeads:
    """Computes attention of chunks of queries, each without the keys after it."""
    queries, keys = query_BTHK.shape[1], key_BSHK.shape[1]
    chunk = queries if queries <= MAX_UNCHUNKED else max(MIN_CHUNK, -(-queries // num_chunks))
    skip_masked = mask.causal and mask.query_position_BT is None
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
    query_BHTK, key_BHSK, value_BHSK = (
        jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    outputs = []
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        num_keys = end if skip_masked else keys
        chunk_query_BHTK = query_BHTK[:, :, start:end]
        chunk_key_BHSK, chunk_value_BHSK = key_BHSK[:, :, :num_keys], value_BHSK[:, :, :num_keys]
        chunk_mask_BTS = mask_BTS[:, start:end, :num_keys]
        weight_BHTS = attention_weights(chunk_query_BHTK, chunk_key_BHSK, chunk_mask_BTS)
        if edit_weights is not None:
            weight_BHTS = edit_weights(weight_BHTS)
        weight_BHTS = weight_BHTS.astype(value_BHSK.dtype)
        outputs.append(jnp.einsum("BHTS,BHSK->BHTK", weight_BHTS, chunk_value_BHSK))
    return jnp.swapaxes(jnp.concatenate(outputs, axis=2), 1, 2)


chunked_causal_attention = functools.partial(reference_attention, num_chunks=NUM_CHUNKS)


def xla_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention with JAX's own implementation."""
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
    return jax.nn.dot_product_attention(
        query_BTHK, key_BSHK, value_BSHK, mask=mask_BTS[:, None], implementation="xla"
    )
