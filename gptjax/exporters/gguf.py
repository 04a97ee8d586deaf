"""GGUF files, for llama.cpp and the tools built on it.

The keys and names are those of llama.cpp's converters; `gptjax.weights.gguf` describes
the file. Matrices have the type of `--dtype`; norms, biases and position embeddings are
float32, which llama.cpp requires, and so are rows that do not divide into blocks.
"""

import dataclasses
import functools
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gptjax.errors import ModelError
from gptjax.exporters.hf import hf_model_type, hf_problem
from gptjax.exporters.tensors import tensor_slots
from gptjax.model.rope import rope_frequencies
from gptjax.tree import num_params
from gptjax.weights.gguf import (
    ARRAY,
    BLOCK_DTYPES,
    BLOCK_SIZE,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    GGUF_MAGIC,
    STRING,
    TENSOR_TYPES,
    align_up,
    dequantize,
    open_gguf,
)
from gptjax.weights.gguf_model import (
    END_TOKEN_KEYS,
    FLOAT_KEYS,
    GPT2_EPSILON,
    NORMAL_TOKEN,
    OPTIONAL_SIZE_KEYS,
    ROPE_FREQS,
    SIZE_KEYS,
)
from gptjax.weights.model_folder import Model
from gptjax.weights.param_map import ParamSlot, pack_tensor, source_shape

UINT32, INT32 = 4, 5  # types of values
CONTROL_TYPE = 3  # in tokenizer.ggml.token_type
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type
POSITIONS = "position_embd.weight"
TYPE_NUMBERS = {name: number for number, name in TENSOR_TYPES.items()}


class TensorEntry(NamedTuple):
    """Tensor of a file, whose values are computed when they are written."""

    name: str
    type: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of bytes."""
        dtype, numbers = BLOCK_DTYPES[self.type], int(np.prod(self.shape))
        return numbers // (BLOCK_SIZE if dtype.names else 1) * dtype.itemsize


def write_gguf(model: Model, path: Path, dtype: str) -> None:
    """Writes a file, one tensor at a time; `dtype` is f32, f16, bf16 or q8_0."""
    if model.labels:
        raise ModelError("GGUF has no classifiers. Use --to hf.")
    if problem := hf_problem(model.config, is_classifier=False):
        raise ModelError(f"{problem}. Train a model with other options.")
    entries = tensor_entries(model, dtype.upper())
    with open(path, "xb") as file:
        write_header(file, gguf_metadata(model, dtype.upper()), entries)
        for entry in entries:
            file.write(encode_tensor(entry.values(), entry.type))
            write_padding(file)


def read_back(model: Model, path: Path, dtype: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields the name of each tensor, its rounded values, and those in the file."""
    _, reader = open_gguf(path)
    for entry in tensor_entries(model, dtype.upper()):
        expected = dequantize(encode_tensor(entry.values(), entry.type), entry.type)
        yield entry.name, expected.reshape(entry.shape), reader.read(entry.name)


def gguf_metadata(model: Model, type_name: str) -> dict[str, Any]:
    """Returns the keys that describe a model and its tokenizer."""
    c, tokenizer, architecture = model.config, model.tokenizer, hf_model_type(model.config)
    sizes = {"mlp_dim": c.actual_mlp_dim}
    values: dict[str, Any] = {key: sizes.get(n) or getattr(c, n) for n, key in SIZE_KEYS.items()}
    if architecture == "gpt2":
        values[GPT2_EPSILON] = c.norm_eps
    else:
        values |= {key: float(getattr(c, name)) for name, (key, _) in FLOAT_KEYS.items()}
        values |= {
            OPTIONAL_SIZE_KEYS["n_kv_heads"]: c.actual_kv_heads,
            OPTIONAL_SIZE_KEYS["head_dim"]: c.actual_head_dim,
            "attention.value_length": c.actual_head_dim,
            "rope.dimension_count": c.actual_head_dim,
        }
    vocab = tokenizer.vocab
    special = set(vocab.special)
    metadata = {
        "general.architecture": architecture,
        "general.name": f"{num_params(model.params):,} parameters",
        "general.file_type": FILE_TYPES[type_name],
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in values.items()},
        f"{architecture}.vocab_size": tokenizer.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tokenizer.pre_tokenizer,
        "tokenizer.ggml.tokens": list(vocab.ids),
        "tokenizer.ggml.token_type": [
            CONTROL_TYPE if name in special else NORMAL_TOKEN for name in vocab.ids
        ],
        "tokenizer.ggml.merges": list(vocab.merges),
        "tokenizer.ggml.eos_token_id": tokenizer.eot_token,
        "tokenizer.ggml.bos_token_id": tokenizer.eot_token
        if tokenizer.bos_token is None
        else tokenizer.bos_token,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
    }
    for key, token_id in zip(END_TOKEN_KEYS[1:], tokenizer.stop_tokens, strict=False):
        metadata[f"tokenizer.ggml.{key}"] = token_id
    if model.chat_template:
        metadata["tokenizer.chat_template"] = model.chat_template
    return metadata


def tensor_entries(model: Model, type_name: str) -> list[TensorEntry]:
    """Returns the tensors of a file, in their order."""
    # llama.cpp does not allow rows without a token.
    c = dataclasses.replace(model.config, vocab_size=model.tokenizer.vocab_size)
    architecture, entries = hf_model_type(c), []
    if c.rope_factor != 1:
        stretch_P = rope_frequencies(dataclasses.replace(c, rope_factor=1.0)) / rope_frequencies(c)
        entries.append(TensorEntry(ROPE_FREQS, "F32", stretch_P.shape, lambda: stretch_P))
    layout = "gpt2-gguf" if architecture == "gpt2" else "gguf"
    slots_by_name, leaves = tensor_slots(dataclasses.replace(model, config=c), layout)
    for name, slots in slots_by_name.items():
        values = functools.partial(pack_tensor, slots, leaves)
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            values = functools.partial(halves_to_pairs, slots, leaves, c.actual_head_dim)
        shape = source_shape(slots)
        is_matrix = len(shape) > 1 and name != POSITIONS
        is_typed = is_matrix and not (BLOCK_DTYPES[type_name].names and shape[-1] % BLOCK_SIZE)
        entries.append(TensorEntry(name, type_name if is_typed else "F32", shape, values))
    return entries


def halves_to_pairs(
    slots: list[ParamSlot], leaves: Mapping[str, np.ndarray], head_dim: int
) -> np.ndarray:
    """Assembles a tensor of query or key heads; inverse of `pairs_to_halves`."""
    tensor = pack_tensor(slots, leaves)
    halves = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_header(file: BinaryIO, metadata: Mapping[str, Any], entries: list[TensorEntry]) -> None:
    """Writes all that precedes the data."""
    file.write(GGUF_MAGIC + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        file.write(encode_string(key) + encode_value(value))
    offset = 0
    for entry in entries:
        dims = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1])
        place = struct.pack("<IQ", TYPE_NUMBERS[entry.type], offset)
        file.write(encode_string(entry.name) + dims + place)
        offset += align_up(entry.size, DEFAULT_ALIGNMENT)
    write_padding(file)


def write_padding(file: BinaryIO) -> None:
    """Writes zeros up to the next multiple of the alignment."""
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def encode_string(text: str) -> bytes:
    """Encodes the length and the bytes of a text."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(value: Any) -> bytes:
    """Encodes the type and the value of a key."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + encode_string(value)
        case [int(), *_]:
            return struct.pack("<IIQ", ARRAY, INT32, len(value)) + array("i", value).tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(encode_string, value))


def encode_tensor(values: np.ndarray, type_name: str) -> bytes:
    """Encodes float32 numbers, rounded to nearest."""
    dtype = BLOCK_DTYPES[type_name]
    if not dtype.names:
        with np.errstate(over="ignore"):
            rounded = values.astype(dtype)
        if (np.isinf(rounded) & np.isfinite(values)).any():
            raise ModelError(
                f"{type_name} has no numbers as large as {np.abs(values).max():.3g}, which the "
                "model contains. Use --dtype f32."
            )
        return rounded.tobytes()
    x = values.reshape(-1, BLOCK_SIZE)
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    blocks = np.empty(len(x), dtype)
    blocks["d"] = d[:, 0]
    blocks["q"] = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))  # halves outwards
    return blocks.tobytes()
