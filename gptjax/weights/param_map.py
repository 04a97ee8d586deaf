"""Parameter names in other layouts: one table for import and export.

Each cell is a source tensor name, with "{n}" for the layer. "[1]" selects the second
third of a fused QKV tensor along its last axis; "^T" marks matrices stored as
[output, input], as in PyTorch's Linear. OpenAI and Hugging Face store [input, output],
as gptjax does.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import GPTConfig

SOURCE_LAYOUTS = ("hf", "openai", "book")  # other than "gptjax"; columns of the tables
TOP_LEVEL = """
token_embedding/embedding     wte.weight      model/wte     tok_emb.weight
position_embedding/embedding  wpe.weight      model/wpe     pos_emb.weight
output_embedding/embedding    lm_head.weight  -             out_head.weight
final_norm/scale              ln_f.weight     model/ln_f/g  final_norm.scale
final_norm/bias               ln_f.bias       model/ln_f/b  final_norm.shift
head/kernel                   score.weight^T  -             -
"""
PER_LAYER = """
attention_norm/scale    ln_1.weight            ln_1/g            norm1.scale
attention_norm/bias     ln_1.bias              ln_1/b            norm1.shift
attention/query/kernel  attn.c_attn.weight[0]  attn/c_attn/w[0]  att.W_query.weight^T
attention/query/bias    attn.c_attn.bias[0]    attn/c_attn/b[0]  att.W_query.bias
attention/key/kernel    attn.c_attn.weight[1]  attn/c_attn/w[1]  att.W_key.weight^T
attention/key/bias      attn.c_attn.bias[1]    attn/c_attn/b[1]  att.W_key.bias
attention/value/kernel  attn.c_attn.weight[2]  attn/c_attn/w[2]  att.W_value.weight^T
attention/value/bias    attn.c_attn.bias[2]    attn/c_attn/b[2]  att.W_value.bias
attention/out/kernel    attn.c_proj.weight     attn/c_proj/w     att.out_proj.weight^T
attention/out/bias      attn.c_proj.bias       attn/c_proj/b     att.out_proj.bias
mlp_norm/scale          ln_2.weight            ln_2/g            norm2.scale
mlp_norm/bias           ln_2.bias              ln_2/b            norm2.shift
mlp/up/kernel           mlp.c_fc.weight        mlp/c_fc/w        ff.layers.0.weight^T
mlp/up/bias             mlp.c_fc.bias          mlp/c_fc/b        ff.layers.0.bias
mlp/down/kernel         mlp.c_proj.weight      mlp/c_proj/w      ff.layers.2.weight^T
mlp/down/bias           mlp.c_proj.bias        mlp/c_proj/b      ff.layers.2.bias
"""
# Prefixes of the names in PER_LAYER.
LAYER_PREFIXES = ("h.{n}.", "model/h{n}/", "trf_blocks.{n}.")


def _parse_param_names() -> dict[str, tuple[str, ...]]:
    """Returns the source names of each parameter, one per layout."""
    table = {ours: theirs for ours, *theirs in map(str.split, TOP_LEVEL.strip().split("\n"))}
    for ours, *theirs in map(str.split, PER_LAYER.strip().split("\n")):
        table[f"blocks/{ours}"] = [a + b for a, b in zip(LAYER_PREFIXES, theirs, strict=True)]
    return {ours: tuple(theirs) for ours, theirs in table.items()}


PARAM_NAMES = _parse_param_names()
# Matrices with one row per token.
EMBEDDING_TABLES = ("token_embedding/embedding", "output_embedding/embedding")
# Causal masks that files store beside the parameters.
IGNORED_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|trf_blocks\.\d+\.att\.mask")
CELL_PATTERN = re.compile(r"([^\[^]+)(?:\[(\d)\])?(\^T)?")


class ParamSlot(NamedTuple):
    """Parameter, or one layer of it, that a source tensor or a third of it maps to."""

    leaf: str  # parameter name
    shape: tuple[int, ...]  # [input, output] or [output], not transposed
    layer: int | None = None  # index on the first axis of the leaf
    qkv_index: int | None = None  # third of a fused QKV tensor
    transposed: bool = False


def param_slots(
    config: GPTConfig, layout: str, leaves: Mapping[str, Any]
) -> dict[str, list[ParamSlot]]:
    """Returns the parameter slots that each tensor of a layout fills, by name.

    `leaves` are parameters or their shapes by name.
    """
    if layout == "gptjax":
        return {name: [ParamSlot(name, shape=leaf.shape)] for name, leaf in leaves.items()}
    slots_by_name: dict[str, list[ParamSlot]] = {}
    for leaf, array in leaves.items():
        cell: Any = CELL_PATTERN.fullmatch(PARAM_NAMES[leaf][SOURCE_LAYOUTS.index(layout)])
        name, qkv_digit, transposed = cell.groups()
        is_stacked = leaf.startswith("blocks/")
        shape = array.shape[1:] if is_stacked else array.shape
        if leaf.endswith("/kernel"):  # sources have no head axis
            input_dim = config.actual_mlp_dim if "mlp/down" in leaf else config.d_model
            shape = (input_dim, int(np.prod(shape)) // input_dim)
        elif is_stacked:
            shape = (int(np.prod(shape)),)
        qkv_index = None if qkv_digit is None else int(qkv_digit)
        for layer in range(config.n_layers) if is_stacked else [None]:
            slot = ParamSlot(leaf, shape, layer, qkv_index, bool(transposed))
            slots_by_name.setdefault(name.format(n=layer), []).append(slot)
    return slots_by_name


def source_shape(slots: list[ParamSlot]) -> tuple[int, ...]:
    """Returns the shape of the source tensor that fills these slots."""
    *first, last = slots[0].shape
    shape = (*first, last * len(slots))
    return shape[::-1] if slots[0].transposed else shape


def unpack_tensor(
    tensor: np.ndarray, slots: list[ParamSlot]
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yields (leaf, layer, values) for each slot, as views of a source tensor."""
    tensor = tensor.reshape(source_shape(slots))
    for slot in slots:
        values = tensor.T if slot.transposed else tensor
        if slot.qkv_index is not None:
            width = slot.shape[-1]
            values = values[..., slot.qkv_index * width : (slot.qkv_index + 1) * width]
        yield slot.leaf, slot.layer, values


def pack_tensor(slots: list[ParamSlot], leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Assembles a source tensor from its slots; inverse of `unpack_tensor`."""
    parts = []
    for slot in sorted(slots, key=lambda slot: slot.qkv_index or 0):
        leaf = leaves[slot.leaf]
        values = leaf if slot.layer is None else leaf[slot.layer]
        parts.append(values.reshape(slot.shape))
    tensor = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return np.ascontiguousarray(tensor.T if slots[0].transposed else tensor)
