"""Strict safetensors reader for untrusted files; reads one tensor at a time.

The library's reader accepts duplicate names and any number of empty tensors, and maps
the whole file. This one rejects files that deviate from the format, reads only the
bytes of the requested tensor, and never allocates more than the size of the file.
Format: 8 bytes of header length, a JSON header, the data without gaps.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax.errors import ModelError
from gptjax.fileio import strict_json

MAX_HEADER_BYTES = 1 << 20  # the largest GPT-2 has 580 tensors in 60,000 bytes
MAX_TENSORS = 10_000  # per file
MAX_TENSOR_AXES = 8
# Allows the names of gptjax, Hugging Face and the book.
TENSOR_NAME_PATTERN = re.compile(r"[A-Za-z0-9_.:/-]{1,256}", re.ASCII)
HEADER_LENGTH_BYTES = 8
SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class TensorInfo(NamedTuple):
    """Location, dtype and shape of a tensor."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # in bytes from the start of the file

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorReader:
    """Tensors of a model's files, which are read one at a time."""

    tensors: Mapping[str, Any]  # values with `.shape` and `.dtype`, by name
    read: Callable[[str], np.ndarray]


def read_array(info: TensorInfo) -> np.ndarray:
    """Reads a tensor into a new array; ModelError if the file was truncated since."""
    array = np.empty(info.shape, info.dtype)
    data = array.reshape(-1).view(np.uint8)
    try:
        with info.path.open("rb") as file:
            file.seek(info.offset)
            if file.readinto(data.data) != data.size:
                raise corrupt_file(info.path, "it ends inside a tensor")
    except OSError as error:
        raise corrupt_file(info.path, error) from error
    return array


def corrupt_file(path: Path, reason: object) -> ModelError:
    """Returns the error for a corrupt file."""
    return ModelError(f"cannot use {path}: {reason}. Copy or download the file again.")


def open_safetensors(paths: Sequence[Path]) -> TensorReader:
    """Opens files as one collection of tensors; reads only their headers."""
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        infos = read_header(path)
        if duplicates := sorted(set(tensors) & set(infos)):
            raise corrupt_file(path, f"another file also has the tensor {duplicates[0]}")
        tensors |= infos
    return TensorReader(tensors, lambda name: read_array(tensors[name]))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads the tensor infos, checked against the file size."""
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            if length > min(file_size - HEADER_LENGTH_BYTES, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {file_size:,}")
            header = strict_json.parse_json(file.read(length))
        return parse_header(path, header, HEADER_LENGTH_BYTES + length, file_size)
    except (OSError, ValueError) as error:
        raise corrupt_file(path, str(error)[:400]) from error


def parse_header(path: Path, header: Any, data_start: int, file_size: int) -> dict[str, TensorInfo]:
    """Parses a header, whose tensors must fill the file; ValueError if invalid."""
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError(f"its header is not an object of at most {MAX_TENSORS:,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    infos = {name: parse_entry(path, name, fields, data_start) for name, fields in header.items()}
    end = data_start
    for info in sorted(infos.values(), key=lambda info: info.offset):
        if info.offset != end:
            raise ValueError(f"no tensor starts at byte {end:,}: gap or overlap")
        end += info.size
    if end != file_size:
        raise ValueError(f"it has {file_size:,} bytes, but its tensors need {end:,}")
    return infos


def parse_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorInfo:
    """Parses and checks one header entry; `data_start` is the offset of the data."""
    if not TENSOR_NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not a valid tensor name")
    match fields:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(first), int(last)],
            **rest,
        } if not rest and 0 not in shape and all(map(_is_valid_size, [*shape, first, last])):
            if dtype not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name[:80]!r} has the dtype {dtype[:20]!r}")
            info = TensorInfo(path, SAFETENSORS_DTYPES[dtype], tuple(shape), data_start + first)
            if info.size == last - first and len(shape) <= MAX_TENSOR_AXES:
                return info
    raise ValueError(f"the header entry of the tensor {name[:80]!r} is not valid")


def _is_valid_size(number: Any) -> bool:
    """True for an integer that can be a file offset or an axis length."""
    return type(number) is int and 0 <= number < 1 << 62
