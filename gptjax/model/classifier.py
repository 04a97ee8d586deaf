"""Text classifier: a linear head on a pooled hidden state of a GPT.

Dimension letters: see `gptjax.model.gpt`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gptjax.config import GPTConfig
from gptjax.model.gpt import hidden_states
from gptjax.tree import Params


def class_logits(
    config: GPTConfig, params: Params, token_BT: Int[Array, "B T"], length_B: Int[Array, " B"]
) -> Float[Array, "B C"]:
    """Computes float32 logits of the classes; padding does not affect them.

    The exception is `config.pool="position"`, which follows Raschka 2024, chapter 6:
    the head reads the last position of the padded row, so the logits depend on the
    amount of padding.

    Rows are padded on the right with any token id; `length_B` is the number of tokens
    without padding, at least 1.
    """
    x_BTD, _ = classifier_hidden_states(config, params, token_BT, length_B)
    return pool_and_project(config, params, x_BTD, length_B)


def classifier_hidden_states(
    config: GPTConfig,
    params: Params,
    token_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
    *,
    dropout_key: Key[Array, ""] | None = None,
    adapters: Params | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """Computes hidden states of padded rows; no token attends to padding.

    Padding is a segment of its own, except with `config.pool="position"`.
    """
    segment_id_BT = None
    if config.pool != "position":
        position_BT = jnp.arange(token_BT.shape[1])[None]
        segment_id_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    return hidden_states(
        config,
        params,
        token_BT,
        segment_id_BT=segment_id_BT,
        dropout_key=dropout_key,
        adapters=adapters,
    )


def pool_and_project(
    config: GPTConfig, params: Params, x_BTD: Float[Array, "B T D"], length_B: Int[Array, " B"]
) -> Float[Array, "B C"]:
    """Pools the hidden states by `config.pool` and applies the head.

    Pooling and head run in float32 with the highest matmul precision.
    """
    position_BT = jnp.arange(x_BTD.shape[1])[None]
    is_token_BT = position_BT < length_B[:, None]
    weight_BT = {
        "last": position_BT == length_B[:, None] - 1,
        "first": position_BT == 0,
        "mean": is_token_BT / length_B[:, None],
        "position": position_BT == x_BTD.shape[1] - 1,
    }[config.pool]
    weight_BT = jnp.broadcast_to(weight_BT, x_BTD.shape[:2]).astype(jnp.float32)
    x_BD = jnp.einsum("BT,BTD->BD", weight_BT, x_BTD.astype(jnp.float32), precision="highest")
    head = params["head"]
    logit_BC = jnp.dot(x_BD, head["kernel"], precision="highest")
    return logit_BC + head["bias"][None] if config.head_bias else logit_BC


class_probabilities = jax.jit(
    lambda config, params, token_BT, length_B: jax.nn.softmax(
        class_logits(config, params, token_BT, length_B)
    ),
    static_argnums=0,
)
