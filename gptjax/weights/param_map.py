"""Parameter names in other layouts: tables for import and export.

Each cell is a source tensor name, with "{n}" for the layer. "[1]" selects the second
third of a fused QKV tensor along its last axis; "^T" marks matrices stored as
[output, input], as in PyTorch's Linear. OpenAI and Hugging Face's GPT-2 store
[input, output], as gptjax does.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import GPTConfig
from gptjax.model.quantization import num_input_axes

# One line per parameter; the columns are layouts.
GPT2_LAYOUTS = ("hf", "openai", "book")
GPT2_TOP_LEVEL = """
token_embedding/embedding     wte.weight      model/wte     tok_emb.weight
position_embedding/embedding  wpe.weight      model/wpe     pos_emb.weight
output_embedding/embedding    lm_head.weight  -             out_head.weight
final_norm/scale              ln_f.weight     model/ln_f/g  final_norm.scale
final_norm/bias               ln_f.bias       model/ln_f/b  final_norm.shift
head/kernel                   score.weight^T  -             -
"""
GPT2_LAYER_PREFIXES = ("h.{n}.", "model/h{n}/", "trf_blocks.{n}.")
GPT2_PER_LAYER = """
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
# Files of llama.cpp, which fuses queries, keys and values as GPT-2 does.
GPT2_GGUF_TOP_LEVEL = """
token_embedding/embedding     token_embd.weight
position_embedding/embedding  position_embd.weight
output_embedding/embedding    output.weight
final_norm/scale              output_norm.weight
final_norm/bias               output_norm.bias
"""
GPT2_GGUF_PER_LAYER = """
attention_norm/scale    attn_norm.weight
attention_norm/bias     attn_norm.bias
attention/query/kernel  attn_qkv.weight[0]^T
attention/query/bias    attn_qkv.bias[0]
attention/key/kernel    attn_qkv.weight[1]^T
attention/key/bias      attn_qkv.bias[1]
attention/value/kernel  attn_qkv.weight[2]^T
attention/value/bias    attn_qkv.bias[2]
attention/out/kernel    attn_output.weight^T
attention/out/bias      attn_output.bias
mlp_norm/scale          ffn_norm.weight
mlp_norm/bias           ffn_norm.bias
mlp/up/kernel           ffn_up.weight^T
mlp/up/bias             ffn_up.bias
mlp/down/kernel         ffn_down.weight^T
mlp/down/bias           ffn_down.bias
"""
LLAMA_LAYOUTS = ("llama", "gguf")
LLAMA_TOP_LEVEL = """
token_embedding/embedding   embed_tokens.weight  token_embd.weight
output_embedding/embedding  lm_head.weight       output.weight
final_norm/scale            norm.weight          output_norm.weight
head/kernel                 score.weight^T       -
"""
LLAMA_LAYER_PREFIXES = ("layers.{n}.", "blk.{n}.")
LLAMA_PER_LAYER = """
attention_norm/scale        input_layernorm.weight           attn_norm.weight
attention/query/kernel      self_attn.q_proj.weight^T        attn_q.weight^T
attention/key/kernel        self_attn.k_proj.weight^T        attn_k.weight^T
attention/value/kernel      self_attn.v_proj.weight^T        attn_v.weight^T
attention/query_norm/scale  self_attn.q_norm.weight          attn_q_norm.weight
attention/key_norm/scale    self_attn.k_norm.weight          attn_k_norm.weight
attention/out/kernel        self_attn.o_proj.weight^T        attn_output.weight^T
mlp_norm/scale              post_attention_layernorm.weight  ffn_norm.weight
mlp/gate/kernel             mlp.gate_proj.weight^T           ffn_gate.weight^T
mlp/up/kernel               mlp.up_proj.weight^T             ffn_up.weight^T
mlp/down/kernel             mlp.down_proj.weight^T           ffn_down.weight^T
"""


def _parse_source_names(
    layouts: tuple[str, ...], top_level: str, layer_prefixes: tuple[str, ...], per_layer: str
) -> dict[str, dict[str, str]]:
    """Returns the cell of each parameter, by layout and parameter name."""
    names: dict[str, dict[str, str]] = {layout: {} for layout in layouts}
    for leaf, *cells in map(str.split, top_level.strip().split("\n")):
        for layout, cell in zip(layouts, cells, strict=True):
            names[layout][leaf] = cell
    for leaf, *cells in map(str.split, per_layer.strip().split("\n")):
        for layout, prefix, cell in zip(layouts, layer_prefixes, cells, strict=True):
            names[layout][f"blocks/{leaf}"] = prefix + cell
    return names


# Cells by layout, other than "gptjax", and parameter name.
SOURCE_NAMES = {
    **_parse_source_names(GPT2_LAYOUTS, GPT2_TOP_LEVEL, GPT2_LAYER_PREFIXES, GPT2_PER_LAYER),
    **_parse_source_names(("gpt2-gguf",), GPT2_GGUF_TOP_LEVEL, ("blk.{n}.",), GPT2_GGUF_PER_LAYER),
    **_parse_source_names(LLAMA_LAYOUTS, LLAMA_TOP_LEVEL, LLAMA_LAYER_PREFIXES, LLAMA_PER_LAYER),
}
# transformers omits it if the model has no head.
HF_PREFIXES = {"hf": "transformer.", "llama": "model."}
# Matrices with one row per token.
EMBEDDING_TABLES = ("token_embedding/embedding", "output_embedding/embedding")
UNEMBEDDING_TENSORS = {names.get(EMBEDDING_TABLES[1]) for names in SOURCE_NAMES.values()}
# Causal masks and frequencies that files store beside the parameters.
IGNORED_BUFFERS = re.compile(
    r"h\.\d+\.attn\.(masked_)?bias|trf_blocks\.\d+\.att\.mask"
    r"|layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope_freqs\.weight"
)
CELL_PATTERN = re.compile(r"([^\[^]+)(?:\[(\d)\])?(\^T)?")


def hf_layout(config: GPTConfig) -> str:
    """Returns the layout of a model in transformers."""
    return "llama" if config.position == "rope" else "hf"


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
        cell: Any = CELL_PATTERN.fullmatch(SOURCE_NAMES[layout][leaf])
        name, qkv_digit, transposed = cell.groups()
        is_stacked = leaf.startswith("blocks/")
        shape = array.shape[1:] if is_stacked else array.shape
        if leaf.endswith("/kernel"):  # sources have no head axis
            num_inputs = num_input_axes(leaf, len(shape))
            shape = (math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:]))
        elif is_stacked:
            shape = (math.prod(shape),)
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
