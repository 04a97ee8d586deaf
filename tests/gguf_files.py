"""GGUF files for tests, of plain values or of a model."""

import dataclasses
import struct

import ml_dtypes
import numpy as np

from gptjax.exporters.tensors import named_tensors
from gptjax.model.rope import rope_frequencies
from gptjax.tokenizer.tokenizer import bytes_to_unicode, derive_merge_lines

# Numbers of the types of values and of tensors, and the formats of the former.
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
FORMATS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}
TENSOR_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


def pack_string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pack_value(kind, value):
    if isinstance(kind, list):  # [kind of the items]
        items = b"".join(pack_value(kind[0], item) for item in value)
        return struct.pack("<IQ", kind[0], len(value)) + items
    return pack_string(value) if kind == STRING else struct.pack(FORMATS[kind], value)


def kind_of(value):
    """The type that llama.cpp's converters write a value as."""
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING}
    if isinstance(value, list):
        item = type(value[0]) if value else str
        return [I32 if item is int else kinds[item]]
    return kinds[type(value)]


def quantize(array, type_name):
    """Bytes of an array whose values the type represents up to rounding."""
    if type_name in ("F32", "F16", "BF16"):
        dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        return array.astype(dtypes[type_name]).tobytes()
    blocks = array.astype(np.float32).reshape(-1, 32)
    least, most = blocks.min(-1, keepdims=True), np.abs(blocks).max(-1, keepdims=True)
    if type_name == "Q8_0":
        d = (most / 127).astype(np.float16)
        return np.hstack([d.view("u1"), np.rint(blocks / d).astype("i1").view("u1")]).tobytes()
    if type_name == "Q4_0":
        head, q = [(most / 7).astype(np.float16)], 8
    else:
        d = ((blocks.max(-1, keepdims=True) - least) / 15).astype(np.float16)
        head, q = [d, least.astype(np.float16)], 0
        blocks = blocks - least
    q = np.clip(np.rint(blocks / head[0]) + q, 0, 15).astype("u1")
    q = q[:, :16] | q[:, 16:] << 4
    return np.hstack([*(x.view("u1") for x in head), q]).tobytes()


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """A GGUF file of values and of (array, type) by name."""
    infos, data = b"", b""
    for name, (array, type_name) in tensors.items():
        dims = struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1])
        infos += pack_string(name) + dims
        infos += struct.pack("<IQ", TENSOR_TYPES[type_name], len(data))
        data += quantize(array, type_name)
        data += bytes(-len(data) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind = kind_of(value)
        number = ARRAY if isinstance(kind, list) else kind
        head += pack_string(key) + struct.pack("<I", number) + pack_value(kind, value)
    head += infos
    return head + bytes(-len(head) % alignment) + data


def gguf_metadata(model, architecture="llama"):
    """Keys that llama.cpp's converter writes for a model."""
    c, tokenizer = model.config, model.tokenizer
    names = {i: bytes_to_unicode(token) for token, i in tokenizer.ranks.items()}
    special = {i: name for name, i in tokenizer.special_tokens.items()}
    tokens = [(names | special)[i] for i in range(tokenizer.vocab_size)]
    shape = {
        "block_count": c.n_layers,
        "context_length": c.context_length,
        "embedding_length": c.d_model,
        "feed_forward_length": c.actual_mlp_dim,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.actual_kv_heads,
        "attention.key_length": c.actual_head_dim,
        "attention.value_length": c.actual_head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.dimension_count": c.actual_head_dim,
        "rope.freq_base": c.rope_theta,
        "vocab_size": c.vocab_size,
    }
    vocabulary = {
        "model": "gpt2",
        "pre": tokenizer.pre_tokenizer,
        "tokens": tokens,
        "token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "merges": derive_merge_lines(tokenizer.ranks),
        "eos_token_id": tokenizer.eot_token,
        "add_bos_token": tokenizer.add_bos,
    }
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in shape.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
    }


def gguf_tensors(model, architecture="llama", type_name="F32"):
    """Tensors that llama.cpp's converter writes for a model."""
    half = model.config.actual_head_dim // 2
    tensors = {}
    if model.config.rope_factor != 1:
        plain = dataclasses.replace(model.config, rope_factor=1.0)
        stretch = rope_frequencies(plain) / rope_frequencies(model.config)
        tensors["rope_freqs.weight"] = (stretch, "F32")
    for name, array in named_tensors(model, "gguf").items():
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            array = array.reshape(-1, 2, half, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        tensors[name] = (array, type_name if array.ndim > 1 else "F32")
    return tensors
