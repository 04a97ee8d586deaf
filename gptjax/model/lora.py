"""LoRA adapters: a separate tree, applied beside the kernels or merged into them.

The adapter of a kernel W [I, O] is `lora_a` [I, R] and `lora_b` [R, O]: the layer
computes x W + (alpha / R) x a b (Hu et al. 2021, "LoRA", sec. 4.1). b is zero at first,
so a new adapter leaves the model unchanged.

    I inputs of a kernel    O outputs of a kernel    R rank    N layers
"""

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
from gptjax.model.quantization import num_input_axes
from gptjax.tree import Params, flatten_with_names, unflatten_names

Adapters = dict[str, Any]


def apply_adapters(
    method: Callable[..., Any], args: Any, kwargs: Any, call: nn.module.InterceptorContext
) -> Any:
    """Computes x W + x a b without forming a b, where a layer has an adapter.

    The layers know nothing of adapters: in the context `nn.intercept_methods`, Flax
    calls this function around all methods of all modules.
    """
    result, layer = method(*args, **kwargs), call.module
    is_matmul = isinstance(layer, Linear) and call.method_name == "matmul"
    if not is_matmul or not layer.has_variable("adapters", "lora_a"):
        return result
    x_BI, names = args[0], ("lora_a", "lora_b")
    a_IR, b_RO = (layer.get_variable("adapters", name).astype(x_BI.dtype) for name in names)
    return result + (x_BI @ a_IR) @ b_RO


def match_targets(params: Params, patterns: str) -> list[str]:
    """Returns the layers of a block that match, such as "attention/query".

    Patterns are those of `fnmatch`, separated by blanks: "attention/* mlp/up".
    """
    kernels = [
        name.removeprefix("blocks/").removesuffix("/kernel")
        for name in flatten_with_names(params)
        if name.startswith("blocks/") and name.endswith("/kernel")
    ]
    if not patterns.split():
        raise ConfigError(
            "finetune.lora_targets is empty, but LoRA needs at least one layer. Name "
            'some, such as "attention/* mlp/*".'
        )
    matched: set[str] = set()
    for pattern in patterns.split():
        if not (found := fnmatch.filter(kernels, pattern)):
            raise ConfigError(
                f"finetune.lora_targets: {pattern!r} matches no layer of a block. "
                f"Choose from {', '.join(kernels)}."
            )
        matched.update(found)
    return [name for name in kernels if name in matched]


def init_adapters(
    config: GPTConfig, params: Params, patterns: str, rank: int, key: Key[Array, ""]
) -> Adapters:
    """Initializes adapters: a uniform in +-1 / sqrt(I), b zero.

    The bound is that of PyTorch's `nn.Linear`, which Microsoft's LoRA and PEFT use. Of
    `params`, only names and shapes are used; `patterns` are those of `match_targets`.
    """
    leaves, kernels = {}, flatten_with_names(params)
    names = match_targets(params, patterns)
    for name, layer_key in zip(names, jax.random.split(key, len(names)), strict=True):
        # The kernel [I, O] has its [H, K] flattened.
        shape = kernels[f"blocks/{name}/kernel"].shape[1:]
        split = num_input_axes(f"{name}/kernel", len(shape))
        num_inputs, num_outputs = math.prod(shape[:split]), math.prod(shape[split:])
        bound, shape = 1 / math.sqrt(num_inputs), (config.n_layers, num_inputs, rank)
        lora_a = jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound)
        leaves[f"blocks/{name}/lora_a"] = lora_a
        leaves[f"blocks/{name}/lora_b"] = jnp.zeros((config.n_layers, rank, num_outputs))
    return unflatten_names(leaves)


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
