"""`jax.nn.dot_product_attention`, as XLA compiles it; O(T S) memory."""

import jax

from gptjax.attention.call import Call, cannot_drop
from gptjax.attention.sight import Heads, KeyHeads, Sight, visible


def xla(
    query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
) -> Heads:
    """The formula, in the order of operations that JAX chose."""
    mask_BTS = visible(sight, query_BTHK, key_BSHK)
    return jax.nn.dot_product_attention(
        query_BTHK,
        key_BSHK,
        value_BSHK,
        mask=mask_BTS[:, None],
        implementation="xla",
    )


def obstacle(call: Call) -> str:
    """Why this backend cannot answer, or nothing."""
    return cannot_drop("xla") if call.dropout else ""
