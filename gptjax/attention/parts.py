"""Attention on each device's own rows and heads, for what XLA cannot split well."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Int

from gptjax.attention.sight import Heads, KeyHeads, Sight
from gptjax.sharding import locally


def by_parts(
    attention: Callable[[Heads, KeyHeads, KeyHeads, Sight], Heads],
    query_BTHK: Heads,
    key_BSHK: KeyHeads,
    value_BSHK: KeyHeads,
    sight: Sight,
) -> Heads:
    """What `attention` gives; on a mesh, each device calls it on its own part."""
    names = [n for n in ("slot_BT", "segment_BT") if getattr(sight, n) is not None]

    def own(
        query_BTHK: Heads,
        key_BSHK: KeyHeads,
        value_BSHK: KeyHeads,
        *places: Int[Array, "B T"],
    ) -> Heads:
        given: Any = dict(zip(names, places, strict=True))
        part = sight._replace(**given)
        return attention(query_BTHK, key_BSHK, value_BSHK, part)

    ins = ("BTHK", "BSHK", "BSHK", *("BT" for _ in names))
    places = [getattr(sight, name) for name in names]
    return locally(own, ins, "BTHK")(query_BTHK, key_BSHK, value_BSHK, *places)
