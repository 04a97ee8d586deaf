"""Strict JSON parser for untrusted input: standard JSON of bounded size and depth.

Python's `json` accepts NaN, keeps the last of duplicate keys, turns 1e999 into
infinity, guesses UTF-16, and raises RecursionError for deeply nested lists.
"""

import io
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_DEPTH = 64  # nesting levels; no model file has more than ten


def parse_json(text: str | bytes) -> Any:
    """Parses one JSON value.

    A ValueError says that it is not JSON (json.JSONDecodeError), not UTF-8, too deeply
    nested, or contains a duplicate or unencodable key or a number out of float range.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(DEPTH_ERROR) from error
    level: Iterable[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [x for x in level if isinstance(x, dict | list)]
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = itertools.chain.from_iterable(parts)
    if any(isinstance(x, dict | list) for x in level):
        raise ValueError(DEPTH_ERROR)
    return value


def read_json(path: Path, max_bytes: int) -> Any:
    """Reads a JSON file of limited size; raises OSError or ValueError."""
    return parse_json(read_small_file(path, max_bytes))


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file of limited size.

    Raises a ValueError if it is no regular file, such as a pipe, or too large.
    """
    with open_regular_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"it has {size:,} bytes, more than {max_bytes:,}")
        return file.read(max_bytes)


def open_regular_file(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading; never waits, as opening a pipe would.

    Raises an error that is a ValueError and an OSError if it is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise io.UnsupportedOperation("it is not a regular file")
    return path.open("rb")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds the dict of an object; rejects duplicate and unencodable keys."""
    result = dict(pairs)
    if not all(map(str.isascii, result)):
        "".join(result).encode()  # keys are printed; lone surrogates cannot be
    if len(result) < len(pairs):
        keys = [name[:20] for name, _ in pairs[:10]]
        raise ValueError(f"an object has duplicate keys; it begins with {keys}")
    return result


def _reject_constant(word: str) -> float:
    """Rejects NaN and Infinity, which are not JSON."""
    raise ValueError(f"{word} is not a JSON number")


def _parse_finite(digits: str) -> float:
    """Parses a float; rejects numbers out of range."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"number {digits[:20]} is out of range")
    return number


def _parse_int(digits: str) -> int:
    """Parses an integer; rejects more digits than Python converts."""
    try:
        return int(digits)
    except ValueError as error:
        raise ValueError(f"number {digits[:20]}... has {len(digits):,} digits") from error


DEPTH_ERROR = f"lists or objects are nested more than {MAX_DEPTH} levels deep"
_DECODER = json.JSONDecoder(
    object_pairs_hook=_reject_duplicate_keys,
    parse_constant=_reject_constant,
    parse_float=_parse_finite,
    parse_int=_parse_int,
)
