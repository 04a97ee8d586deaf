"""Tensors of safetensors files, read by name.

The library checks that the tensors of a header fill the file exactly.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from gptjax.errors import ModelError, to_os_error
from gptjax.fileio.strict_json import open_regular_file

MAX_SAFETENSORS_HEADER_BYTES = 1 << 20  # the largest GPT-2 has 580 tensors in 60,000 bytes
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorInfo(NamedTuple):
    """Location, dtype and shape of a tensor."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorReader:
    """Tensors of a model's files, which are read one at a time."""

    tensors: Mapping[str, Any]  # values with `.shape` and `.dtype`, by name
    read: Callable[[str], np.ndarray]


def write_safetensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file marked as PyTorch's, readable by all users."""
    try:
        safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise to_os_error(error, path) from error
    path.chmod(0o644)  # the library creates it with mode 0600


def open_safetensors(paths: Sequence[Path]) -> TensorReader:
    """Opens files as one collection of tensors; reads only their headers."""
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        with _open_file(path) as file:
            for name in [*file.keys()]:
                tensor = file.get_slice(name)
                dtype = tensor.get_dtype()
                if name in tensors:
                    raise ValueError(f"another file also has the tensor {name}")
                if dtype not in SAFETENSORS_DTYPES:
                    raise ValueError(f"{name} has the dtype {dtype}")
                shape = tuple(tensor.get_shape())
                tensors[name] = TensorInfo(path, SAFETENSORS_DTYPES[dtype], shape)

    def read(name: str) -> np.ndarray:
        # Opened for each tensor, so that a file truncated in the meantime is an error.
        with _open_file(tensors[name].path) as file:
            return file.get_tensor(name)

    return TensorReader(tensors, read)


def read_finite(reader: TensorReader, name: str, location: Path) -> np.ndarray:
    """Reads a tensor; ModelError unless its values are finite in float32."""
    tensor = reader.read(name)
    if not is_finite(tensor):
        raise ModelError(
            f"{location}: {name[:80]} contains values that are non-finite in float32. Copy the "
            "file again, or retrain the model."
        )
    return tensor


def is_finite(tensor: np.ndarray) -> bool:
    """True if all values are finite in float32."""
    # Tests all values without allocating a mask: min and max propagate nan.
    with np.errstate(over="ignore"):
        limits = np.array([tensor.min(), tensor.max()]).astype(np.float32)
    return bool(np.isfinite(limits).all())


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Any]:
    """Opens a file and validates its header; also translates errors in the block."""
    try:
        with open_regular_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_SAFETENSORS_HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes")
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error)[:400]  # may quote the file
        raise ModelError(f"cannot use {path}: {reason!r}. Copy or download it again.") from error
