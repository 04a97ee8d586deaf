"""Checks of the arguments of the public functions, before anything is computed.

They read shapes and names, so inside `jit` they run once, while it traces. Dimension
letters: see `gptjax.model.gpt`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, DataError, ModelError, check_type
from gptjax.tree import Params, flatten_with_names

Shapes = dict[str, tuple[int, ...]]  # by parameter name


def check_tokens(config: GPTConfig, token_BT: Any) -> None:
    """Validates token ids: their shape, their dtype and, unless traced, their range."""
    check_type("tokens", token_BT, jax.Array | np.ndarray, "Write jnp.array([ids]).")
    shape = tuple(token_BT.shape)
    if len(shape) != 2:
        fix = "Add the axis of rows: tokens[None]." if len(shape) == 1 else ""
        raise ConfigError(f"tokens have shape {shape} instead of [B, T], rows and positions. {fix}")
    if 0 in shape:
        raise ConfigError(f"tokens have shape {shape}. Pass at least one row and one position.")
    if not jnp.issubdtype(token_BT.dtype, jnp.integer):
        raise ConfigError(
            f"tokens have dtype {token_BT.dtype}, but token ids are integers. Encode "
            "the text with the model's tokenizer."
        )
    if shape[1] > config.context_length:
        raise ConfigError(
            f"{shape[1]} tokens exceed model.context_length={config.context_length}. "
            "Shorten the row or raise the context length."
        )
    if isinstance(token_BT, jax.core.Tracer) or not getattr(token_BT, "is_fully_addressable", True):
        return  # ids are unknown, or partly on other hosts
    ids = np.asarray(token_BT)
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise DataError(
            f"token {outside[0]} is outside the vocabulary of model.vocab_size="
            f"{config.vocab_size}. Encode with the model's tokenizer."
        )


def check_param_shapes(expected: Shapes, params: Params) -> None:
    """Validates names and shapes of parameters; a classification head is ignored."""
    check_type("params", params, Mapping, "Pass those of init or of a model.")
    found = found_shapes(params)
    for name in [*expected, *found]:
        if name not in found:
            problem = f"{name} {expected[name]} is missing"
        elif name not in expected:
            problem = f"{name} {found[name]} is not one of its parameters"
        elif expected[name] != found[name]:
            problem = f"{name} has shape {found[name]} instead of {expected[name]}"
        else:
            continue
        raise ModelError(
            f"params belong to another config: {problem}. Use the GPTConfig that they "
            "were initialized or saved with."
        )


def found_shapes(params: Params) -> Shapes:
    """Shapes of parameters, without a head; "tail" counts as part of "blocks"."""
    shapes: Shapes = {}
    for name, leaf in flatten_with_names(params).items():
        stack, _, rest = name.partition("/")
        name = f"blocks/{rest}" if stack == "tail" else name
        shape = tuple(jnp.shape(leaf))
        if name in shapes and shapes[name][1:] == shape[1:]:
            shape = (shapes[name][0] + shape[0], *shape[1:])
        if stack != "head":
            shapes[name] = shape
    return shapes
