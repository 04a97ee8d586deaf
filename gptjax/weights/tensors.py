"""The tensors of safetensors files, one at a time and nothing believed.

The library's reader accepts a name that appears twice, tensors of no bytes by the
hundred thousand, and maps the whole file; this one refuses what is not exact, and reads
just the bytes of the tensor asked for. Memory is taken only for what the file has.
Format: 8 bytes of header length, a JSON header, the data, without gaps.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax import strict_json
from gptjax.errors import ModelError

HEADER_BYTES = 1 << 20  # the largest GPT-2 has 580 tensors in 60,000 bytes
MOST_TENSORS = 10_000  # of one file
MOST_AXES = 8
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}", re.ASCII)  # of ours, HF, the book
LENGTH_BYTES = 8
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class Entry(NamedTuple):
    """One tensor in one file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


@dataclasses.dataclass(frozen=True)
class Safetensors:
    """The tensors of one or several files."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own.

        Raises:
            ModelError: the file became shorter.
        """
        entry = self.tensors[name]
        array = np.empty(entry.shape, entry.dtype)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view, done = array.reshape(-1).view(np.uint8), 0
            while done < view.size:
                got = file.readinto(view[done:].data)
                if not got:
                    raise damaged(entry.path, f"it ends inside the tensor {name}")
                done += got
        return array


def damaged(path: Path, why: str) -> ModelError:
    """The error for a file that cannot be trusted."""
    return ModelError(f"cannot use {path}: {why}. Copy or download the file again.")


def open_safetensors(paths: Sequence[Path]) -> Safetensors:
    """The tensors of the files together; only headers are read.

    Raises:
        ModelError: a file is not exactly a safetensors file, or a name is in two.
    """
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        entries, about = read_header(path)
        if twice := sorted(set(tensors) & set(entries)):
            raise damaged(path, f"another file has the tensor {twice[0]} too")
        tensors |= entries
        metadata |= about
    return Safetensors(tensors, metadata)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """What one file holds, checked against its size, and its metadata."""
    header, start, size = read_json(path)
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(
        isinstance(value, str) for value in metadata.values()
    )
    if not texts:
        raise damaged(path, "its metadata is not a table of texts")
    if len(header) > MOST_TENSORS:
        raise damaged(path, f"it has {len(header):,} tensors, over {MOST_TENSORS:,}")
    entries = {name: entry(path, name, line, start) for name, line in header.items()}
    end = start
    for e in sorted(entries.values(), key=lambda e: (e.start, extent(e))):
        if e.start != end:
            raise damaged(path, f"byte {end:,} is not where its next tensor begins")
        end += extent(e)
    if end != size:
        raise damaged(path, f"it has {size:,} bytes, but its tensors need {end:,}")
    return entries, metadata


def read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a file, where its data begin, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > min(size - LENGTH_BYTES, HEADER_BYTES):
                why = f"a header of {length:,} bytes in a file of {size:,}"
                raise damaged(path, why)
            text = file.read(length)
    except OSError as error:
        raise damaged(path, str(error)) from error
    try:
        header = strict_json.parse(text)
    except ValueError as error:
        why = f"its header is not JSON ({str(error)[:200]})"
        raise damaged(path, why) from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not an object")
    return header, LENGTH_BYTES + length, size


def extent(entry: Entry) -> int:
    """Bytes of a tensor."""
    return math.prod(entry.shape) * entry.dtype.itemsize


def entry(path: Path, name: str, line: Any, start: int) -> Entry:
    """One line of a header, checked by itself; `start` is where the data begin."""
    if not NAME.fullmatch(name):
        raise damaged(path, f"{name[:80]!r} is no name of a tensor")
    match line:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(first), int(last)],
            **rest,
        } if not rest and 0 not in shape and all(map(sized, [*shape, first, last])):
            if dtype not in DTYPES:
                raise damaged(path, f"{name[:80]!r} has the type {dtype[:20]!r}")
            found = Entry(path, DTYPES[dtype], tuple(shape), start + first)
            if extent(found) == last - first and len(shape) <= MOST_AXES:
                return found
    raise damaged(path, f"the header's line for the tensor {name[:80]!r} is not valid")


def sized(number: Any) -> bool:
    """Whether it can be a place in a file."""
    return type(number) is int and 0 <= number < 1 << 62
