"""What a query may see; the letters in array names are those of `gptjax.model`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Heads = Float[Array, "B T H K"]
KeyHeads = Float[Array, "B S H K"]

MIXED = "mixed"  # what kernels call that of their results which backward needs


class Sight(NamedTuple):
    """What each query may see of the keys; always itself, so never nothing.

    The arrays are of the queries. Documents are for rows that bring their own keys,
    slots for queries that were given the keys of earlier ones as well.
    """

    slot_BT: Int[Array, "B T"] | None = None  # its place among the keys; None: t at t
    segment_BT: Int[Array, "B T"] | None = None  # its document; padding is one, too
    causal: bool = True  # whether later keys are hidden
    window: int | None = None  # of earlier ones, window - 1 are seen; None: all


def visible(
    sight: Sight, query_BTHK: Heads, key_BSHK: KeyHeads
) -> Bool[Array, "B T S"]:
    """True where a query may see a key."""
    slot_BT, slot_S = slots(sight, query_BTHK), jnp.arange(key_BSHK.shape[1])
    return seen(sight, slot_BT, slot_S, sight.segment_BT, sight.segment_BT)


def slots(sight: Sight, query_BTHK: Heads) -> Int[Array, "B T"]:
    """Where among the keys each query stands."""
    if sight.slot_BT is not None:
        return sight.slot_BT
    return jnp.broadcast_to(jnp.arange(query_BTHK.shape[1])[None], query_BTHK.shape[:2])


def seen(
    sight: Sight,
    slot_BT: Int[Array, "B T"],
    slot_S: Int[Array, " S"],
    segment_BT: Int[Array, "B T"] | None,
    segment_BS: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"]:
    """The rule itself, for any queries and any keys: of `sight`, only its numbers."""
    here_BTS, there_BTS = slot_BT[:, :, None], slot_S[None, None, :]
    mask_BTS = jnp.ones((*slot_BT.shape, slot_S.size), bool)
    if sight.causal:
        mask_BTS &= there_BTS <= here_BTS
    if sight.window is not None:
        mask_BTS &= there_BTS > here_BTS - sight.window
    if segment_BT is not None and segment_BS is not None:
        mask_BTS &= segment_BT[:, :, None] == segment_BS[:, None, :]
    return mask_BTS
