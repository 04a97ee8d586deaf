"""Rows in one buffer, which takes a fraction of the memory of an object per row."""

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows(Sequence[Row], Generic[Row]):
    """Rows as parts of a buffer, decoded at each access; created by `pack_columns`."""

    buffer: bytearray = dataclasses.field(repr=False)
    starts: np.ndarray = dataclasses.field(repr=False)  # index of the first byte of each row
    stops: np.ndarray = dataclasses.field(repr=False)
    decode: Callable[[bytearray], Row]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        """Returns one row, or the rows of a slice."""
        if isinstance(index, slice):
            return dataclasses.replace(self, starts=self.starts[index], stops=self.stops[index])
        return self.decode(self.buffer[self.starts[index] : self.stops[index]])


def encode_text(text: str) -> bytes:
    """Encodes text, which may have the lone surrogates of a file name."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(encoded: bytearray) -> str:
    """Reverses `encode_text`."""
    return encoded.decode("utf-8", "surrogatepass")


def pack_columns(
    rows: Iterable[Sequence[bytes]], *decode: Callable[[bytearray], Any]
) -> list[PackedRows[Any]]:
    """Packs each column of the encoded rows, with the function that decodes it.

    >>> texts, _ = pack_columns([(b"ab", b"c"), (b"", b"d")], decode_text, bytes)
    >>> list(texts), list(take_rows(texts, [1, 0]))
    (['ab', ''], ['', 'ab'])
    """
    buffer, bounds = bytearray(), array("q", [0])
    for row in rows:
        for value in row:
            buffer += value
            bounds.append(len(buffer))
    bound = np.frombuffer(bounds, np.int64)
    if len(buffer) < 1 << 32:  # half the memory
        bound = bound.astype(np.uint32)
    columns = range(len(decode))
    parts = [(bound[n : -1 : len(decode)], bound[n + 1 :: len(decode)]) for n in columns]
    return [PackedRows(buffer, *part, decode[n]) for n, part in enumerate(parts)]


def take_rows(rows: Sequence[Row], indices: Sequence[int] | np.ndarray) -> Sequence[Row]:
    """Returns the rows at `indices`, in this order, without a copy of packed ones."""
    if not isinstance(rows, PackedRows):
        return [rows[n] for n in indices]
    chosen = np.asarray(indices, np.int64)
    return dataclasses.replace(rows, starts=rows.starts[chosen], stops=rows.stops[chosen])
