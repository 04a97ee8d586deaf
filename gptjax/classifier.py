"""A class for a text: one hidden state of a GPT, and a head that reads it.

The letters in array names are those of `gptjax.model`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptjax.config import GPTConfig
from gptjax.model import Params, hidden


def class_logits(
    config: GPTConfig,
    params: Params,
    token_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
    **options: Any,
) -> Float[Array, "B C"]:
    """Scores of the classes in float32; the padding of a row changes nothing.

    Only with `pool` "position", which is the book's, the head reads what the last
    position makes of the padding, and the scores depend on how long that is.

    Args:
        config: with `n_classes`.
        params: as `gptjax.init` makes them, with a head.
        token_BT: rows filled up on the right; with what does not matter.
        length_B: real tokens of each row, at least 1.
        **options: `dropout_key` and `adapters` of `gptjax.hidden`.
    """
    x_BTD, _ = read(config, params, token_BT, length_B, **options)
    return head_logits(config, params, x_BTD, length_B)


def read(
    config: GPTConfig,
    params: Params,
    token_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
    **options: Any,
) -> tuple[Float[Array, "B T D"], Any]:
    """`gptjax.hidden` of padded rows: no real token sees the padding."""
    segment_BT = None
    if config.pool != "position":
        place_BT = jnp.arange(token_BT.shape[1])[None]
        segment_BT = (place_BT < length_B[:, None]).astype(jnp.int32)
    return hidden(config, params, token_BT, segment_BT=segment_BT, **options)


def head_logits(
    config: GPTConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    length_B: Int[Array, " B"],
) -> Float[Array, "B C"]:
    """What the head makes of the hidden states."""
    place_BT = jnp.arange(x_BTD.shape[1])[None]
    real_BT = place_BT < length_B[:, None]
    weight_BT = {
        "last": place_BT == length_B[:, None] - 1,
        "first": place_BT == 0,
        "mean": real_BT / length_B[:, None],
        "position": place_BT == x_BTD.shape[1] - 1,
    }[config.pool]
    weight_BT = jnp.broadcast_to(weight_BT, x_BTD.shape[:2]).astype(jnp.float32)
    x_BD = jnp.einsum(
        "BT,BTD->BD", weight_BT, x_BTD.astype(jnp.float32), precision="highest"
    )
    head = params["head"]
    logit_BC = jnp.dot(x_BD, head["kernel"], precision="highest")
    return logit_BC + head["bias"][None] if config.head_bias else logit_BC


def class_nats(
    logit_BC: Float[Array, "B C"],
    class_B: Int[Array, " B"],
    weight_B: Float[Array, " B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the right class, summed, and the weight to divide it by.

    >>> import jax.numpy as jnp
    >>> nats, weight = class_nats(
    ...     jnp.zeros((2, 4)), jnp.array([1, 3]), jnp.array([1.0, 0.0]))
    >>> print(f"{nats:.4f} nats over {weight:.0f} text")  # ln 4
    1.3863 nats over 1 text
    """
    nats_B = optax.softmax_cross_entropy_with_integer_labels(logit_BC, class_B)
    return jnp.sum(nats_B * weight_B), jnp.sum(weight_B)


chances = jax.jit(
    lambda config, params, token_BT, length_B: jax.nn.softmax(
        class_logits(config, params, token_BT, length_B)
    ),
    static_argnums=0,
)
