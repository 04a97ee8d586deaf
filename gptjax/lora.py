"""Low-rank adapters: a tree of their own, added to kernels or merged into them.

Of a kernel W [in, out], an adapter is `lora_a` [in, R] and `lora_b` [R, out]: the
layer computes x W + (alpha / R) x a b (Hu et al. 2021, "LoRA", section 4.1). b starts
at 0, so a fresh adapter changes nothing.
"""

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model import Params
from gptjax.tree import named_leaves

Adapters = dict[str, Any]


def targets_of(params: Params, patterns: str) -> list[str]:
    """Names of the layers whose kernels the patterns choose, as in one block.

    Raises:
        ConfigError: a pattern chooses none.
    """
    kernels = [
        name.removeprefix("blocks/").removesuffix("/kernel")
        for name in named_leaves(params)
        if name.startswith("blocks/") and name.endswith("/kernel")
    ]
    for pattern in patterns.split():
        if not fnmatch.filter(kernels, pattern):
            raise ConfigError(
                f"tune.lora_targets has {pattern!r}, which is no layer of a block. "
                f"Known: {', '.join(kernels)}."
            )
    chosen = [
        name
        for name in kernels
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())
    ]
    if not chosen:
        raise ConfigError(
            "tune.lora_targets is empty, so there is nothing to adapt. Name layers, "
            'such as "attention/* mlp/*".'
        )
    return chosen


def init_adapters(
    config: GPTConfig, params: Params, patterns: str, rank: int, key: Key[Array, ""]
) -> Adapters:
    """Fresh adapters: a uniform within 1 / sqrt(in), as PyTorch has it; b zero.

    Args:
        config: shape of the model.
        params: of the model; only their shapes count.
        patterns: of layers in a block, separated by blanks.
        rank: [R], the same for all.
        key: of the draw.

    Raises:
        ConfigError: a pattern chooses no layer.
    """
    blocks: Adapters = {}
    names = targets_of(params, patterns)
    for name, each in zip(names, jax.random.split(key, len(names)), strict=True):
        inner, outer = matrix_shape(config, params, name)
        bound, place = 1 / math.sqrt(inner), blocks
        *path, last = name.split("/")
        for step in path:
            place = place.setdefault(step, {})
        shape = (config.n_layers, inner, rank)
        place[last] = {
            "lora_a": jax.random.uniform(each, shape, minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((config.n_layers, rank, outer)),
        }
    return {"blocks": blocks}


def matrix_shape(config: GPTConfig, params: Params, name: str) -> tuple[int, int]:
    """[in, out] of a layer's kernel, heads taken together."""
    leaf = named_leaves(params)[f"blocks/{name}/kernel"]
    inner = config.mlp_width if name == "mlp/down" else config.d_model
    return inner, math.prod(leaf.shape[1:]) // inner


def scaled(adapters: Adapters, scale: float | Array) -> Adapters:
    """Adapters whose products count `scale` = alpha / R times."""

    def value(path: Any, leaf: Array) -> Array:
        return leaf * scale if path[-1].key == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(value, adapters)


def merged(params: Params, adapters: Adapters) -> Params:
    """Parameters that compute the same without adapters, which are already scaled."""

    def value(kernel: Params, adapter: Any) -> Params:
        if "lora_a" in adapter:
            product = jnp.einsum("NIR,NRO->NIO", adapter["lora_a"], adapter["lora_b"])
            added = kernel["kernel"] + product.reshape(kernel["kernel"].shape)
            return {**kernel, "kernel": added}
        return {
            key: value(kernel[key], adapter[key]) if key in adapter else kernel[key]
            for key in kernel
        }

    return {**params, "blocks": value(params["blocks"], adapters["blocks"])}
