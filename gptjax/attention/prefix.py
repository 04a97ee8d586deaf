"""Chunked causal attention: chunks of queries, each with the keys up to its end.

Skips most of the masked upper triangle; O(T·S) memory.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from gptjax.attention.plain import attend_masked
from gptjax.attention.sight import (
    QueryHeads,
    KeyValueHeads,
    AttentionMask,
    materialize_mask,
)

NUM_CHUNKS = 4  # of queries; with more, smaller matmuls cost more than skipping saves
MIN_CHUNK = 32  # queries in a chunk
MAX_UNCHUNKED = 64  # queries; up to here, chunks cost more than they save


def chunked_causal_attention(
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
    dropout: Callable[[Array], Array] | None = None,
) -> QueryHeads:
    """Computes the same as `reference_attention`, without most of the masked keys."""
    queries, keys = query_BTHK.shape[1], key_BSHK.shape[1]
    chunk = (
        queries
        if queries <= MAX_UNCHUNKED
        else max(MIN_CHUNK, -(-queries // NUM_CHUNKS))
    )
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
                dropout,
            )
        )
    return jnp.swapaxes(jnp.concatenate(chunks, axis=2), 1, 2)
