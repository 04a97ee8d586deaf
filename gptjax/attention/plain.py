"""The formula as it stands in Vaswani et al. 2017, eq. 1; O(T S) memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptjax.attention.sight import Heads, KeyHeads, Sight, visible


def attention_weights(
    query_BTHK: Heads, key_BSHK: KeyHeads, mask_BTS: Bool[Array, "B T S"]
) -> Float[Array, "B H T S"]:
    """How much of each key a query takes: a float32 softmax, 0 where masked."""
    score_BHTS = jnp.einsum(
        "BTHK,BSHK->BHTS",
        query_BTHK,
        key_BSHK,
        preferred_element_type=jnp.float32,
    )
    score_BHTS *= query_BTHK.shape[-1] ** -0.5
    least = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BHTS, least))


def plain(
    query_BTHK: Heads,
    key_BSHK: KeyHeads,
    value_BSHK: KeyHeads,
    sight: Sight,
    dropout: Callable[[Array], Array] | None = None,
) -> Heads:
    """The weighted sum of the values; the one backend that can drop weights."""
    mask_BTS = visible(sight, query_BTHK, key_BSHK)
    weight_BHTS = attention_weights(query_BTHK, key_BSHK, mask_BTS)
    if dropout is not None:
        weight_BHTS = dropout(weight_BHTS)
    weight_BHTS = weight_BHTS.astype(value_BSHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK)
