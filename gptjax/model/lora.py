"""LoRA adapters: a separate tree, applied beside the kernels or merged into them.

The adapter of a kernel W [I, O] is `lora_a` [I, R] and `lora_b` [R, O]: the layer
computes x W + (alpha / R) x a b (Hu et al. 2021, "LoRA", sec. 4.1). b is zero at first,
so a new adapter leaves the model unchanged.

    I inputs of a kernel    O outputs of a kernel    R rank    N layers
"""

import contextlib
import fnmatch
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model.layers import Linear
from gptjax.tree import Params, flatten_with_names

Adapters = dict[str, Any]


def apply_adapters() -> contextlib.AbstractContextManager[None]:
    """Context in which the kernels of all `Linear` layers use their adapters.

    The layers know nothing of adapters: Flax calls `add_update` around their methods.
    """
    return nn.intercept_methods(add_update)


def add_update(
    matmul: Callable[..., Array], args: Any, kwargs: Any, call: nn.module.InterceptorContext
) -> Any:
    """Computes x W + x a b without forming a b, where a layer has an adapter."""
    result = matmul(*args, **kwargs)
    layer = call.module
    if not (isinstance(layer, Linear) and call.method_name == "matmul"):
        return result
    if not layer.has_variable("adapters", "lora_a"):
        return result
    x_BI = args[0]
    a_IR, b_RO = (
        layer.get_variable("adapters", name).astype(x_BI.dtype) for name in ("lora_a", "lora_b")
    )
    return result + (x_BI @ a_IR) @ b_RO


def match_targets(params: Params, patterns: str) -> list[str]:
    """Returns the layers of a block that match, such as "attention/query".

    Args:
        params: parameters of the model; only names are used.
        patterns: `fnmatch` patterns separated by blanks, e.g. "attention/* mlp/up".

    Raises:
        ConfigError: there is no pattern, or one matches no layer.
    """
    kernels = [
        name.removeprefix("blocks/").removesuffix("/kernel")
        for name in flatten_with_names(params)
        if name.startswith("blocks/") and name.endswith("/kernel")
    ]
    for pattern in patterns.split():
        if not fnmatch.filter(kernels, pattern):
            raise ConfigError(
                f"finetune.lora_targets: {pattern!r} matches no layer of a block. "
                f"Choose from {', '.join(kernels)}."
            )
    matched = [
        name
        for name in kernels
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())
    ]
    if not matched:
        raise ConfigError(
            "finetune.lora_targets is empty, but LoRA needs at least one layer. Name "
            'some, such as "attention/* mlp/*".'
        )
    return matched


def init_adapters(
    config: GPTConfig, params: Params, patterns: str, rank: int, key: Key[Array, ""]
) -> Adapters:
    """Initializes adapters: a uniform in +-1 / sqrt(I), b zero.

    The bound is that of PyTorch's `nn.Linear`, which Microsoft's LoRA and PEFT use.

    Args:
        config: shape of the model.
        params: parameters of the model; only names and shapes are used.
        patterns: layers of a block to adapt, see `match_targets`.
        rank: [R], the same for all layers.
        key: JAX key of the initial values.

    Raises:
        ConfigError: there is no pattern, or one matches no layer.
    """
    blocks: Adapters = {}
    names = match_targets(params, patterns)
    for name, layer_key in zip(names, jax.random.split(key, len(names)), strict=True):
        num_inputs, num_outputs = kernel_shape(config, params, name)
        bound, node = 1 / math.sqrt(num_inputs), blocks
        *path, last = name.split("/")
        for step in path:
            node = node.setdefault(step, {})
        shape = (config.n_layers, num_inputs, rank)
        node[last] = {
            "lora_a": jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((config.n_layers, rank, num_outputs)),
        }
    return {"blocks": blocks}


def kernel_shape(config: GPTConfig, params: Params, name: str) -> tuple[int, int]:
    """Returns the shape [I, O] of a layer's kernel as a matrix, [H, K] flattened."""
    leaf = flatten_with_names(params)[f"blocks/{name}/kernel"]
    num_inputs = config.mlp_dim if name == "mlp/down" else config.d_model
    return num_inputs, math.prod(leaf.shape[1:]) // num_inputs


def scale_adapters(adapters: Adapters, scale: float | Array) -> Adapters:
    """Multiplies the update a b of each adapter by `scale`, usually alpha / R."""

    def scale_leaf(path: Any, leaf: Array) -> Array:
        return leaf * scale if path[-1].key == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(scale_leaf, adapters)


def merge_adapters(params: Params, adapters: Adapters) -> Params:
    """Adds the updates of scaled adapters to the kernels (PEFT: `merge_and_unload`)."""

    def merge_tree(tree: Params, adapter_tree: Any) -> Params:
        if "lora_a" in adapter_tree:
            update = jnp.einsum("NIR,NRO->NIO", adapter_tree["lora_a"], adapter_tree["lora_b"])
            merged_kernel = tree["kernel"] + update.reshape(tree["kernel"].shape)
            return {**tree, "kernel": merged_kernel}
        return {
            key: merge_tree(tree[key], adapter_tree[key]) if key in adapter_tree else tree[key]
            for key in tree
        }

    return {**params, "blocks": merge_tree(params["blocks"], adapters["blocks"])}
