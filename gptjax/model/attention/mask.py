"""Attention masks and calls as data; dimension letters: see `gptjax.model.gpt`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QueryHeads = Float[Array, "B T H K"]
KeyValueHeads = Float[Array, "B S H K"]
GroupedHeads = Float[Array, "B S G K"]  # each for H / G heads of queries
QueriesHeadsFirst = Float[Array, "B H T K"]
KeysHeadsFirst = Float[Array, "B H S K"]

ATTN_OUT = "mixed"  # `checkpoint_name` of the attention output, saved by remat policies


class AttentionMask(NamedTuple):
    """Attention mask: which keys each query attends to.

    A query attends to key s if all conditions hold, hence always to itself. Backends
    get this description instead of an array, so that kernels can skip masked blocks.
    Positions are for decoding, where keys come from a cache; segment ids are for packed
    rows, where queries and keys are of the same tokens. Only one may be given.

    Attributes:
        query_position_BT: index of each query among the keys; None = t.
        segment_id_BT: document of each token; padding is a document of its own.
        causal: whether keys after the query are masked.
    """

    query_position_BT: Int[Array, "B T"] | None = None
    segment_id_BT: Int[Array, "B T"] | None = None
    causal: bool = True


class AttentionSpec(NamedTuple):
    """Static properties of one attention call, which determine backend support."""

    num_queries: int  # [T]
    num_keys: int  # [S]
    head_dim: int  # [K]
    dtype: str
    platform: str  # as returned by `target_platform`
    edits_weights: bool = False  # e.g. dropout on attention weights
    has_query_positions: bool = False  # queries attend to a KV cache


def materialize_mask(
    mask: AttentionMask, query_BTHK: QueryHeads, key_BSHK: KeyValueHeads
) -> Bool[Array, "B T S"]:
    """Returns the mask as an array: True where a query attends to a key."""
    query_position_BT = query_positions(mask, query_BTHK)
    key_position_S = jnp.arange(key_BSHK.shape[1])
    return make_attention_mask(
        mask.causal, query_position_BT, key_position_S, mask.segment_id_BT, mask.segment_id_BT
    )


def query_positions(mask: AttentionMask, query_BTHK: QueryHeads) -> Int[Array, "B T"]:
    """Returns the index of each query among the keys."""
    if mask.query_position_BT is not None:
        return mask.query_position_BT
    return jnp.broadcast_to(jnp.arange(query_BTHK.shape[1])[None], query_BTHK.shape[:2])


def make_attention_mask(
    causal: bool,
    query_position_BT: Int[Array, "B T"],
    key_position_S: Int[Array, " S"],
    query_segment_id_BT: Int[Array, "B T"] | None,
    key_segment_id_BS: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"]:
    """Returns the mask of a block of queries and keys, at positions among all keys."""
    query_BTS, key_BTS = query_position_BT[:, :, None], key_position_S[None, None, :]
    mask_BTS = jnp.ones((*query_position_BT.shape, key_position_S.size), bool)
    if causal:
        mask_BTS &= key_BTS <= query_BTS
    if query_segment_id_BT is not None and key_segment_id_BS is not None:
        mask_BTS &= query_segment_id_BT[:, :, None] == key_segment_id_BS[:, None, :]
    return mask_BTS
