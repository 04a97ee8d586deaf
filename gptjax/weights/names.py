"""Where each parameter lies in the files of others: one table, read in both ways.

A cell is a name of theirs, "{n}" the layer. "[1]" takes the second third of a joint
tensor along its last axis; "^T" says that a matrix is stored as [outer, inner], which
PyTorch's Linear does. OpenAI's and Hugging Face's lie as ours do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import GPTConfig

LAYOUTS = ("hf", "openai", "book")  # of others; in "gptjax", names are ours
WHOLE = """
token_embedding/embedding     wte.weight      model/wte     tok_emb.weight
position_embedding/embedding  wpe.weight      model/wpe     pos_emb.weight
output_embedding/embedding    lm_head.weight  -             out_head.weight
final_norm/scale              ln_f.weight     model/ln_f/g  final_norm.scale
final_norm/bias               ln_f.bias       model/ln_f/b  final_norm.shift
head/kernel                   score.weight^T  -             -
"""
STACKED = """
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
LAYERS = ("h.{n}.", "model/h{n}/", "trf_blocks.{n}.")  # before the names in STACKED


def read_table() -> dict[str, tuple[str, ...]]:
    """Ours: theirs by layout."""
    table = {
        ours: theirs for ours, *theirs in map(str.split, WHOLE.strip().split("\n"))
    }
    for ours, *theirs in map(str.split, STACKED.strip().split("\n")):
        table[f"blocks/{ours}"] = [a + b for a, b in zip(LAYERS, theirs, strict=True)]
    return {ours: tuple(theirs) for ours, theirs in table.items()}


TABLE = read_table()
TABLES = ("token_embedding/embedding", "output_embedding/embedding")  # a row a token
# Constants that files hold beside the parameters: masks, not learned.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|trf_blocks\.\d+\.att\.mask")
CELL = re.compile(r"([^\[^]+)(?:\[(\d)\])?(\^T)?")


class Home(NamedTuple):
    """What one tensor of theirs is to us: (part of) one leaf, of one layer of it."""

    leaf: str  # name of ours
    shape: tuple[int, ...]  # [inner, outer] or [outer], oriented as ours
    layer: int | None = None  # on the leaf's first axis
    part: int | None = None  # which third of theirs
    transposed: bool = False


def homes(
    config: GPTConfig, layout: str, leaves: Mapping[str, Any]
) -> dict[str, list[Home]]:
    """For each tensor of a layout, by name, the leaves that it fills.

    Args:
        config: shape of the model.
        layout: one of LAYOUTS, or "gptjax".
        leaves: the parameters, or their shapes, by name.
    """
    if layout == "gptjax":
        return {name: [Home(name, shape=leaf.shape)] for name, leaf in leaves.items()}
    found: dict[str, list[Home]] = {}
    for leaf, array in leaves.items():
        cell: Any = CELL.fullmatch(TABLE[leaf][LAYOUTS.index(layout)])
        name, part, transposed = cell.groups()
        stacked = leaf.startswith("blocks/")
        shape = array.shape[1:] if stacked else array.shape
        if leaf.endswith("/kernel"):  # the heads of theirs are not an axis
            inner = config.mlp_width if "mlp/down" in leaf else config.d_model
            shape = (inner, int(np.prod(shape)) // inner)
        elif stacked:
            shape = (int(np.prod(shape)),)
        for layer in range(config.n_layers) if stacked else [None]:
            third = None if part is None else int(part)
            home = Home(leaf, shape, layer, third, bool(transposed))
            found.setdefault(name.format(n=layer), []).append(home)
    return found


def their_shape(filled: list[Home]) -> tuple[int, ...]:
    """The shape of the tensor that fills these homes."""
    *first, last = filled[0].shape
    shape = (*first, last * len(filled))
    return shape[::-1] if filled[0].transposed else shape


def take(
    tensor: np.ndarray, filled: list[Home]
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(leaf, layer, values) for each home of a tensor of theirs, as views of it."""
    tensor = tensor.reshape(their_shape(filled))
    for home in filled:
        values = tensor.T if home.transposed else tensor
        if home.part is not None:
            width = home.shape[-1]
            values = values[..., home.part * width : (home.part + 1) * width]
        yield home.leaf, home.layer, values


def give(filled: list[Home], leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor of theirs that these homes make up; the inverse of `take`."""
    parts = []
    for home in sorted(filled, key=lambda home: home.part or 0):
        leaf = leaves[home.leaf]
        values = leaf if home.layer is None else leaf[home.layer]
        parts.append(values.reshape(home.shape))
    tensor = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return np.ascontiguousarray(tensor.T if filled[0].transposed else tensor)
