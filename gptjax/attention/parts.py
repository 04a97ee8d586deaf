"""`shard_map` over rows and heads, for kernels that XLA does not partition well."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Int

from gptjax.attention.sight import QueryHeads, KeyValueHeads, AttentionMask
from gptjax.sharding import shard_map_local


def shard_map_attention(
    attention: Callable[
        [QueryHeads, KeyValueHeads, KeyValueHeads, AttentionMask], QueryHeads
    ],
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
) -> QueryHeads:
    """Calls `attention`; on a mesh, on each device with its shard of rows and heads."""
    names = [n for n in ("slot_BT", "segment_BT") if getattr(mask, n) is not None]

    def attend_shard(
        query_BTHK: QueryHeads,
        key_BSHK: KeyValueHeads,
        value_BSHK: KeyValueHeads,
        *places: Int[Array, "B T"],
    ) -> QueryHeads:
        shard_arrays: Any = dict(zip(names, places, strict=True))
        shard_mask = mask._replace(**shard_arrays)
        return attention(query_BTHK, key_BSHK, value_BSHK, shard_mask)

    in_axes = ("BTHK", "BSHK", "BSHK", *("BT" for _ in names))
    arrays = [getattr(mask, name) for name in names]
    return shard_map_local(attend_shard, in_axes, "BTHK")(
        query_BTHK, key_BSHK, value_BSHK, *arrays
    )
