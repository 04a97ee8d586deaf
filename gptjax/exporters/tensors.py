"""Tensors of a model by the names of a format, and options that a format has."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.tree import flatten_with_names
from gptjax.weights.model_folder import Model
from gptjax.weights.param_map import EMBEDDING_TABLES, ParamSlot, pack_tensor, param_slots

# Options that an architecture determines.
GPT2_OPTIONS: dict[str, Any] = {
    **{"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True},
    **{"qk_norm": False, "causal": True},
}


def named_tensors(model: Model, layout: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a layout by name, without vocabulary padding."""
    slots_by_name, leaves = tensor_slots(model, layout)
    return {name: pack_tensor(slots, leaves) for name, slots in slots_by_name.items()}


def tensor_slots(
    model: Model, layout: str
) -> tuple[dict[str, list[ParamSlot]], dict[str, np.ndarray]]:
    """Returns the parts of the tensors of a layout, for `pack_tensor`."""
    c, (embedding_name, head_name) = model.config, EMBEDDING_TABLES
    leaves = {n: np.asarray(leaf) for n, leaf in flatten_with_names(model.params).items()}
    for name in {embedding_name, head_name} & set(leaves):
        leaves[name] = leaves[name][: c.vocab_size]
    if model.labels:
        leaves.pop(head_name, None)  # classifiers of transformers have no LM head
    if layout == "book" and c.tie_embeddings:
        leaves[head_name] = leaves[embedding_name]
    if layout in ("hf", "gpt2-gguf") and not c.qkv_bias:  # GPT-2 requires them
        zeros = np.zeros((c.n_layers, c.n_heads, c.actual_head_dim), np.float32)
        for name in ("query", "key", "value"):
            leaves[f"blocks/attention/{name}/bias"] = zeros
    return param_slots(c, layout, leaves), leaves


def gpt2_values(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """Returns the values that options of a GPT-2 of this size can have."""
    values = {n: (value,) for n, value in GPT2_OPTIONS.items()}
    head_dim = config.d_model / config.n_heads
    return values | {"n_kv_heads": (0, config.n_heads), "head_dim": (0, head_dim)}


def unsupported_options(
    config: GPTConfig, values: Mapping[str, tuple[Any, ...]], models: str
) -> str:
    """Says which options have none of the values of a format; "" if all do."""
    found = {name: getattr(config, name) for name in values}
    others = [
        f"model.{n}={value} (only {values[n][0]})"
        for n, value in found.items()
        if value not in values[n]
    ]
    return f"{models} of this format do not have {', '.join(others)}" if others else ""


def lossless_dtype(arrays: Iterable[np.ndarray]) -> str:
    """Returns bfloat16 if it represents all values exactly, else float32."""
    is_exact = all(not (array.view(np.uint32) & 0xFFFF).any() for array in arrays)
    return "bfloat16" if is_exact else "float32"
