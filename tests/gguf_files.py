"""GGUF files for tests, written from plain values."""

import struct

import ml_dtypes
import numpy as np

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
        return [I32 if type(value[0]) is int else kinds[type(value[0])]]
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
