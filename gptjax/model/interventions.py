"""Capture points: activations that `gptjax.apply` returns and that a caller can add to.

Each of the N blocks has these, in the order of computation:

    residual     [N, B, T, D]     input of the block
    query        [N, B, T, H, K]  output of the query projection
    key          [N, B, T, G, K]  output of the key projection
    value        [N, B, T, G, K]  output of the value projection
    attention    [N, B, H, T, S]  attention weights: after the softmax, before dropout
    head_output  [N, B, T, H, K]  sum of the values, weighted by `attention`, of each
                                  head; input of the output projection
    mlp_hidden   [N, B, T, F]     after the activation; input of the output projection
    mlp_output   [N, B, T, D]     output of the MLP, before dropout

An intervention is an array of the same shape, where axes other than N may have size 1.
It is added at its point, and the captured activation contains it. With an intervention,
attention weights need not sum to 1. If `attention` is captured or has an intervention,
the reference backend computes attention, since the others never form the weights.

Dimension letters: see `gptjax.model.gpt`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from gptjax.config import GPTConfig, did_you_mean
from gptjax.errors import ConfigError

CapturePoint = Literal[
    "residual", "query", "key", "value", "attention", "head_output", "mlp_hidden", "mlp_output"
]
POINT_MODULES = {  # name -> module of a block that has it, axes of one layer
    "residual": ("", "BTD"),
    "query": ("attention", "BTHK"),
    "key": ("attention", "BTGK"),
    "value": ("attention", "BTGK"),
    "attention": ("attention", "BHTT"),
    "head_output": ("attention", "BTHK"),
    "mlp_hidden": ("mlp", "BTF"),
    "mlp_output": ("mlp", "BTD"),
}


def capture_point(module: nn.Module, name: str, value: Array) -> Array:
    """Adds the intervention of that name, if any, then captures the sum if asked to.

    Flax collections hold both: "interventions" the arrays to add, and one collection
    per point its captured activations, which is mutable only if they were asked for.
    Without either, nothing is added to the compiled program.
    """
    variable = variable_name(name)
    if module.has_variable("interventions", variable):
        value += module.get_variable("interventions", variable).astype(value.dtype)
    overwrite: Any = lambda _, new: new  # noqa: E731 (Flax expects a tuple)
    module.sow(name, variable, value, init_fn=tuple, reduce_fn=overwrite)
    return value


def variable_name(name: str) -> str:
    """Name of the Flax variable of a point; some points are named like a layer."""
    return f"{name}_point"


def is_observed(module: nn.Module, name: str) -> bool:
    """True if the activation of that name is captured or has an intervention."""
    has_intervention = module.has_variable("interventions", variable_name(name))
    return has_intervention or module.is_mutable_collection(name)


def check_points(option: str, names: Iterable[str]) -> None:
    """Raises ConfigError for the first name that is no capture point."""
    for name in names:
        if name not in POINT_MODULES:
            raise ConfigError(
                f"{option}: {name!r} is not a capture point."
                f"{did_you_mean(name, POINT_MODULES)} Known: "
                f"{', '.join(POINT_MODULES)}."
            )


def intervention_variables(
    config: GPTConfig,
    interventions: Mapping[str, Array],
    token_shape: tuple[int, ...],
    num_tail_layers: int,
) -> dict[str, Any]:
    """Arranges interventions as a Flax collection of the stacks "blocks" and "tail"."""
    check_points("interventions", interventions)
    sizes = dict(zip("BT", token_shape, strict=True), D=config.d_model, F=config.actual_mlp_dim)
    sizes |= {"H": config.n_heads, "G": config.actual_kv_heads, "K": config.actual_head_dim}
    split = config.n_layers - num_tail_layers
    stacks = {"blocks": slice(0, split), "tail": slice(split, None)}
    variables: dict[str, Any] = {"blocks": {}, "tail": {}}
    for name, array in interventions.items():
        module, letters = POINT_MODULES[name]
        shape, expected = jnp.shape(array), (config.n_layers, *map(sizes.get, letters))
        fits = len(shape) == len(expected) and shape[0] == config.n_layers
        if not fits or any(n not in (1, m) for n, m in zip(shape, expected, strict=True)):
            raise ConfigError(
                f"interventions[{name!r}] has shape {shape}, which does not fit the "
                f"activation's {expected}, [N{letters}]. Use this shape; axes other than "
                "the first may have size 1."
            )
        for stack, layers in stacks.items():
            node = variables[stack]
            node = node.setdefault(module, {}) if module else node
            node[variable_name(name)] = array[layers]
    return variables


def stack_captured(captured: Mapping[str, Any], names: Iterable[str]) -> dict[str, Array]:
    """Returns {name: activations [N, ...]}: those of "blocks", then of "tail"."""
    return {name: jnp.concatenate(jax.tree.leaves(captured[name])) for name in names}
