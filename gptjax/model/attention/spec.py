"""Attention call properties that determine backend support."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from gptjax.model.attention.mask import AttentionMask, KeyValueHeads, QueryHeads
from gptjax.parallel.sharding import shard_map_local


class AttentionSpec(NamedTuple):
    """Static properties of one attention call."""

    num_queries: int  # [T]
    num_keys: int  # [S]
    head_dim: int  # [K]
    dtype: str
    platform: str  # as returned by `target_platform`
    edits_weights: bool = False  # e.g. dropout on attention weights
    has_query_positions: bool = False  # queries attend to a KV cache


def shard_map_attention(
    attention: Callable[[QueryHeads, KeyValueHeads, KeyValueHeads, AttentionMask], QueryHeads],
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
) -> QueryHeads:
    """Calls `attention`; on a mesh, on each device with its shard of rows and heads."""
    names = [n for n in ("query_position_BT", "segment_id_BT") if getattr(mask, n) is not None]

    def attend_shard(query: Array, key: Array, value: Array, *arrays: Array) -> QueryHeads:
        mask_arrays: Any = dict(zip(names, arrays, strict=True))
        return attention(query, key, value, mask._replace(**mask_arrays))

    in_axes = ("BTHK", "BSHK", "BSHK", *("BT" for _ in names))
    arrays = query_BTHK, key_BSHK, value_BSHK, *(getattr(mask, name) for name in names)
    return shard_map_local(attend_shard, in_axes, "BTHK")(*arrays)
