"""The formula as it stands in Vaswani et al. 2017, eq. 1; O(T S) memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptjax.attention.sight import Heads, KeyHeads, Sight, visible

Rows = Float[Array, "B H T K"]
KeyRows = Float[Array, "B H S K"]
Mask = Bool[Array, "B T S"]


def attention_weights(
    query_BHTK: Rows, key_BHSK: KeyRows, mask_BTS: Mask
) -> Float[Array, "B H T S"]:
    """How much of each key a query takes: a float32 softmax, 0 where masked."""
    score_BHTS = jnp.einsum(
        "BHTK,BHSK->BHTS", query_BHTK, key_BHSK, preferred_element_type=jnp.float32
    )
    score_BHTS *= query_BHTK.shape[-1] ** -0.5
    least = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BHTS, least))


def weighted(
    query_BHTK: Rows,
    key_BHSK: KeyRows,
    value_BHSK: KeyRows,
    mask_BTS: Mask,
    dropout: Callable[[Array], Array] | None = None,
) -> Rows:
    """The weighted sum of the values; heads come first, as a CPU's products want it."""
    weight_BHTS = attention_weights(query_BHTK, key_BHSK, mask_BTS)
    if dropout is not None:
        weight_BHTS = dropout(weight_BHTS)
    weight_BHTS = weight_BHTS.astype(value_BHSK.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", weight_BHTS, value_BHSK)


def plain(
    query_BTHK: Heads,
    key_BSHK: KeyHeads,
    value_BSHK: KeyHeads,
    sight: Sight,
    dropout: Callable[[Array], Array] | None = None,
) -> Heads:
    """All weights at once."""
    mask_BTS = visible(sight, query_BTHK, key_BSHK)
    query_BHTK, key_BHSK, value_BHSK = (
        jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
    )
    mixed_BHTK = weighted(query_BHTK, key_BHSK, value_BHSK, mask_BTS, dropout)
    return jnp.swapaxes(mixed_BHTK, 1, 2)
