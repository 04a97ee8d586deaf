"""The formula for some of the queries at a time, with the keys up to the last of them.

Of a causal row, what is above the diagonal is hardly computed; O(T S) memory.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from gptjax.attention.plain import weighted
from gptjax.attention.sight import Heads, KeyHeads, Sight, visible

BLOCKS = 4  # of queries; more save less than their own products cost
LEAST = 32  # queries of a block
WHOLE = 64  # queries that are taken at once, where blocks cost more than they save


def prefix(
    query_BTHK: Heads,
    key_BSHK: KeyHeads,
    value_BSHK: KeyHeads,
    sight: Sight,
    dropout: Callable[[Array], Array] | None = None,
) -> Heads:
    """The same sum as `plain`, without most of the keys that are hidden."""
    queries, keys = query_BTHK.shape[1], key_BSHK.shape[1]
    block = queries if queries <= WHOLE else max(LEAST, -(-queries // BLOCKS))
    own = sight.causal and sight.slot_BT is None
    mask_BTS = visible(sight, query_BTHK, key_BSHK)
    query_BHTK, key_BHSK, value_BHSK = (
        jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    parts = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        reach = end if own else keys
        parts.append(
            weighted(
                query_BHTK[:, :, start:end],
                key_BHSK[:, :, :reach],
                value_BHSK[:, :, :reach],
                mask_BTS[:, start:end, :reach],
                dropout,
            )
        )
    return jnp.swapaxes(jnp.concatenate(parts, axis=2), 1, 2)
