"""GGUF files of llama.cpp: metadata, and tensors dequantized to float32.

header    "GGUF", version, number of tensors, number of keys; all is little-endian
metadata  key, type and value of each
tensors   name, dims (fastest first), type and offset of each
data      tensors in the same order, each padded to `general.alignment` bytes

The files are untrusted. Counts, lengths and offsets are Python integers, which do not
overflow, and are checked against the size of the file before memory is allocated. The
data is read one tensor at a time.
"""

import io
import math
import os
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax.errors import ModelError
from gptjax.fileio.strict_json import open_regular_file
from gptjax.weights.safetensors import TensorReader

GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 26  # all before the data; the vocabulary of Llama 3 needs 8 MB
MAX_TENSOR_NAME_BYTES = 63  # of a tensor
MAX_NUM_DIMS = 4
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 16  # bytes
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9  # types of values
# Type codes of `array` by type of value; a bool is one byte.
VALUE_CODES = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B"},
    **{10: "Q", 11: "q", 12: "d"},
}
TENSOR_TYPES = {  # all but those of BLOCK_DTYPES are only for messages
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K"},
    **{11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 18: "IQ3_XXS"},
    **{20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 39: "MXFP4"},
}
# One number, or a block of 32 along the first dim: d * q, d * (q - 8) with Q4_0,
# d * q + m with Q4_1.
BLOCK_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "i1", 32)]),
    "Q4_0": np.dtype([("d", "<f2"), ("q", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
}
BLOCK_SIZE = 32  # numbers


class GGUFTensor(NamedTuple):
    """Type, shape and location of a tensor."""

    type: str
    shape: tuple[int, ...]
    offset: int  # in the file
    size: int  # in bytes
    dtype: np.dtype = np.dtype(np.float32)  # when read


def is_gguf(path: Path) -> bool:
    """True for a file that has the extension or the magic number of GGUF."""
    try:
        with open_regular_file(path) as file:
            return path.suffix == ".gguf" or file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> tuple[dict[str, Any], TensorReader]:
    """Returns the metadata and the tensors of a file; reads no tensor data."""
    try:
        with open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            metadata, tensors = parse_header(file.read(min(size, MAX_HEADER_BYTES)), size)
    except (OSError, ValueError) as error:
        raise unusable_gguf(path, error) from error

    def read(name: str) -> np.ndarray:
        # Opened for each tensor, so that a file truncated in the meantime is an error.
        tensor = tensors[name]
        try:
            with open_regular_file(path) as file:
                file.seek(tensor.offset)
                data = read_bytes(file, tensor.size, tensor.size)
        except (OSError, ValueError) as error:
            raise unusable_gguf(path, error) from error
        with np.errstate(over="ignore", invalid="ignore"):  # `read_finite` reports them
            return dequantize(data, tensor.type).reshape(tensor.shape)

    return metadata, TensorReader(tensors, read)


def unusable_gguf(path: Path, reason: object) -> ModelError:
    """Returns the error for a corrupt or unsupported file."""
    return ModelError(
        f"cannot use {path}: {reason}. Download it again, or use another file of the model."
    )


def parse_header(header: bytes, file_size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Parses all that precedes the data; ValueError if invalid."""
    stream = io.BytesIO(header)
    if read_bytes(stream, len(GGUF_MAGIC)) != GGUF_MAGIC:
        raise ValueError("it does not start with GGUF")
    if (version := read_uint(stream, 4)) not in GGUF_VERSIONS:
        raise ValueError(f"it has version {version}, but gptjax reads versions 2 and 3")
    num_tensors, num_keys = read_uint(stream), read_uint(stream)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = read_string(stream)
        if key in metadata:
            raise ValueError(f"it has two keys {key[:80]!r}")
        metadata[key] = read_value(stream, read_uint(stream, 4), key)
    tensors, end = {}, 0
    alignment = check_alignment(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    for _ in range(num_tensors):
        name, tensor = read_tensor_info(stream)
        if name in tensors:
            raise ValueError(f"it has two tensors {name!r}")
        if tensor.offset != end:
            raise ValueError(f"{name!r} is at {tensor.offset:,} of the data, not at {end:,}")
        tensors[name] = tensor
        end = align_up(tensor.offset + tensor.size, alignment)
    start = align_up(stream.tell(), alignment)
    tensors = {name: x._replace(offset=start + x.offset) for name, x in tensors.items()}
    for name, tensor in tensors.items():
        if (end := tensor.offset + tensor.size) > file_size:
            raise ValueError(f"{name!r} ends at byte {end:,}, but the file has {file_size:,}")
    if tensors and file_size > (end := align_up(end, alignment)):
        raise ValueError(f"its tensors end at byte {end:,}, but the file has {file_size:,}")
    return metadata, tensors


def align_up(offset: int, alignment: int) -> int:
    """Rounds an offset up to a multiple of the alignment."""
    return -(-offset // alignment) * alignment


def check_alignment(alignment: Any) -> int:
    """Returns the alignment of a file if it is valid."""
    is_valid = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT
    if not is_valid or alignment & (alignment - 1):
        raise ValueError(
            f"general.alignment={alignment!r:.60} is not a power of two up to {MAX_ALIGNMENT:,}"
        )
    return alignment


def read_tensor_info(stream: io.BytesIO) -> tuple[str, GGUFTensor]:
    """Reads the name of a tensor and where in the data it is."""
    name = read_string(stream, MAX_TENSOR_NAME_BYTES)
    if not 1 <= (num_dims := read_uint(stream, 4)) <= MAX_NUM_DIMS:
        raise ValueError(f"{name!r} has {num_dims:,} dims, not 1 to {MAX_NUM_DIMS}")
    dims = tuple(read_uint(stream) for _ in range(num_dims))
    if 0 in dims:
        raise ValueError(f"{name!r} has the shape {dims}")
    number, offset = read_uint(stream, 4), read_uint(stream)
    type_name = TENSOR_TYPES.get(number, "?")
    if type_name not in BLOCK_DTYPES:
        known = ", ".join(BLOCK_DTYPES)
        raise ValueError(f"{name!r} has type {number} ({type_name}), but gptjax reads {known}")
    dtype = BLOCK_DTYPES[type_name]
    block_size = BLOCK_SIZE if dtype.names else 1
    if dims[0] % block_size:
        raise ValueError(f"{name!r} has rows of {dims[0]:,} numbers in blocks of {block_size}")
    size = math.prod(dims) // block_size * dtype.itemsize
    return name, GGUFTensor(type_name, dims[::-1], offset, size)


def read_value(stream: io.BytesIO, kind: int, key: str) -> Any:
    """Reads a value of the metadata; strings are in lists, numbers in arrays."""
    if kind == STRING:
        return read_string(stream)
    if kind != ARRAY:
        (number,) = read_numbers(stream, kind, 1, key)
        # The shortest float32 is what was written: 1e-05, not 9.999999747378752e-06.
        number = float(str(np.float32(number))) if kind == FLOAT32 else number
        return bool(number) if kind == BOOL else number
    item_kind, count = read_uint(stream, 4), read_uint(stream)
    if item_kind == ARRAY:
        raise ValueError(f"{key[:80]!r} is an array of arrays")
    if item_kind == STRING:
        return [read_string(stream) for _ in range(count)]  # ends before the header does
    return read_numbers(stream, item_kind, count, key)


def read_numbers(stream: io.BytesIO, kind: int, count: int, key: str) -> array:
    """Reads numbers of a type."""
    if kind not in VALUE_CODES:
        raise ValueError(f"{key[:80]!r} has a value of the unknown type {kind}")
    numbers = array(VALUE_CODES[kind])
    numbers.frombytes(read_bytes(stream, count * numbers.itemsize))
    if kind == BOOL and max(numbers, default=0) > 1:
        raise ValueError(f"{key[:80]!r} is neither false nor true, but {max(numbers)}")
    return numbers


def read_string(stream: io.BytesIO, max_bytes: int = MAX_HEADER_BYTES) -> str:
    """Reads a string of limited length."""
    return read_bytes(stream, read_uint(stream), max_bytes).decode("utf-8")


def read_uint(stream: io.BytesIO, size: int = 8) -> int:
    """Reads an unsigned integer of `size` bytes."""
    return int.from_bytes(read_bytes(stream, size), "little")


def read_bytes(stream: Any, count: int, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """Reads exactly `count` bytes."""
    if count > max_bytes:
        raise ValueError(f"it has an entry of {count:,} bytes, more than {max_bytes:,}")
    data = stream.read(count)
    if len(data) != count:
        raise ValueError(f"it ends {count - len(data):,} bytes too early")
    return data


def dequantize(data: bytes, type_name: str) -> np.ndarray:
    """Returns the float32 numbers of a tensor's bytes."""
    blocks = np.frombuffer(data, BLOCK_DTYPES[type_name])
    if not blocks.dtype.names:
        return blocks.astype(np.float32)
    d, q = blocks["d"].astype(np.float32)[:, None], blocks["q"]
    if type_name == "Q8_0":
        return d * q
    q = np.concatenate([q & 15, q >> 4], axis=-1)  # element j and j + 16 share a byte
    if type_name == "Q4_0":
        return d * (q.view(np.int8) - np.int8(8))
    return d * q + blocks["m"].astype(np.float32)[:, None]
