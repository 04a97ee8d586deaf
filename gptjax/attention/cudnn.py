"""cuDNN's flash attention, for NVIDIA GPUs from Ampere on.

It knows no documents: rows of several come with a mask of T x S numbers, which costs
memory but hides what it should.
"""

from typing import Any

import jax

from gptjax.attention.call import Call, cannot_drop
from gptjax.attention.parts import by_parts
from gptjax.attention.sight import Heads, KeyHeads, Sight, visible
from gptjax.errors import ConfigError

WIDEST = 128  # head that every supported GPU takes
NAME = "model.attention='cudnn'"


def cudnn(
    query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
) -> Heads:
    """The same sum, by NVIDIA's kernel.

    Raises:
        ConfigError: cuDNN is not there, or refuses this shape.
    """
    try:
        return by_parts(part, query_BTHK, key_BSHK, value_BSHK, sight)
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # of running, such as too little memory
        raise ConfigError(
            f"{NAME} is not possible here: {error} Use model.attention='xla'."
        ) from error


def part(
    query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
) -> Heads:
    """One device's rows and heads; either a mask says what is hidden, or causality."""
    placed = sight.slot_BT is not None or sight.segment_BT is not None
    options: dict[str, Any] = {}
    if placed or (sight.window is not None and not sight.causal):
        mask_BTS = visible(sight, query_BTHK, key_BSHK)
        options["mask"] = mask_BTS[:, None]
    else:
        options["is_causal"] = sight.causal
        if sight.window is not None:
            options["local_window_size"] = (sight.window - 1, 0)
    return jax.nn.dot_product_attention(
        query_BTHK, key_BSHK, value_BSHK, implementation="cudnn", **options
    )


def obstacle(call: Call) -> str:
    """Why this backend cannot answer, or nothing."""
    instead = "Use model.attention='xla'"
    if call.dropout:
        return cannot_drop("cudnn")
    if call.platform != "gpu":
        return (
            f"{NAME} needs an NVIDIA GPU from Ampere on, not a {call.platform}. "
            f"{instead}."
        )
    if call.dtype not in ("bfloat16", "float16"):
        return (
            f"{NAME} takes 16-bit numbers, not {call.dtype}. {instead} or "
            "model.dtype='bfloat16'."
        )
    if call.head_width % 8 or call.head_width > WIDEST:
        return (
            f"{NAME} takes heads whose width is a multiple of 8 up to {WIDEST}, not "
            f"{call.head_width}. {instead} or another model.n_heads."
        )
    if call.keys % 2 or (call.queries % 2 and not call.slots):
        return (
            f"{NAME} takes rows of an even length, not {call.queries} queries and "
            f"{call.keys} keys. {instead} or an even length."
        )
    return ""
