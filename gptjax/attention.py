"""Causal attention: one function, several backends, the same answer.

The letters in array names are those of `gptjax.model`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptjax.errors import ConfigError

Heads = Float[Array, "B T H K"]
KeyHeads = Float[Array, "B S H K"]
Segments = Int[Array, "B T"]
KeySegments = Int[Array, "B S"]


def visible(
    slot_BT: Int[Array, "B T"],
    keys: int,
    segment_BT: Segments | None = None,
    segment_BS: KeySegments | None = None,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """True where a query may see a key: not later, and of the same segment.

    A query always sees itself, so no row of the mask is empty.

    Args:
        slot_BT: where among the keys each query stands.
        keys: [S] how many keys there are.
        segment_BT: document of each query; None where all are of one.
        segment_BS: document of each key.
        causal: whether later keys are hidden.
    """
    mask_BTS = jnp.arange(keys)[None, None, :] <= slot_BT[:, :, None]
    if not causal:
        mask_BTS = jnp.ones_like(mask_BTS)
    if segment_BT is not None and segment_BS is not None:
        mask_BTS &= segment_BT[:, :, None] == segment_BS[:, None, :]
    return mask_BTS


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
    mask_BTS: Bool[Array, "B T S"],
    dropout: Callable[[Array], Array] | None = None,
) -> Heads:
    """The formula as it stands in Vaswani et al. 2017, eq. 1; O(T S) memory."""
    weight_BHTS = attention_weights(query_BTHK, key_BSHK, mask_BTS)
    if dropout is not None:
        weight_BHTS = dropout(weight_BHTS)
    weight_BHTS = weight_BHTS.astype(value_BSHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK)


def xla(
    query_BTHK: Heads,
    key_BSHK: KeyHeads,
    value_BSHK: KeyHeads,
    mask_BTS: Bool[Array, "B T S"],
    dropout: Callable[[Array], Array] | None = None,
) -> Heads:
    """`jax.nn.dot_product_attention`, which has no dropout."""
    if dropout is not None:
        raise ConfigError(
            "model.attention='xla' cannot drop attention weights. Use "
            "model.attention='plain' or model.dropout=0."
        )
    return jax.nn.dot_product_attention(
        query_BTHK,
        key_BSHK,
        value_BSHK,
        mask=mask_BTS[:, None],
        implementation="xla",
    )


BACKENDS = {"plain": plain, "xla": xla}


def chosen_backend(name: str, dropout: float = 0.0) -> str:
    """The backend that "auto" stands for on this platform and with this dropout."""
    if name != "auto":
        return name
    return "plain" if dropout or jax.default_backend() == "cpu" else "xla"
