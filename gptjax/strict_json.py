"""JSON from strangers: what the standard says, of bounded size and depth, or an error.

Python's own reader takes NaN, keeps the last of two equal names, turns 1e999 into
infinity, guesses UTF-16, and fails with RecursionError where lists are nested deeply.
"""

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DEPTH = 64  # of lists and objects inside each other; no file of a model has ten


def parse(text: str | bytes) -> Any:
    """The one value that the text is.

    Raises:
        ValueError: it is not JSON (json.JSONDecodeError), not UTF-8, nested too deeply,
            or has a name twice, one that is no text, or a number that no float holds.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    check_depth(value)
    return value


def parse_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends.

    Raises:
        ValueError: as `parse`.
    """
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    check_depth(value)
    return value, end


def read_json(path: Path, most: int) -> Any:
    """The value in a file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer, or as `parse`.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return parse(data)


def check_depth(value: Any) -> None:
    """Raises a ValueError if lists and objects are nested too deeply."""
    level: Iterable[Any] = [value]
    for _ in range(DEPTH):
        level = [x for x in level if isinstance(x, dict | list) and x]
        if not level:
            return
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = itertools.chain.from_iterable(parts)
    if any(isinstance(x, dict | list) for x in level):
        raise ValueError(TOO_DEEP)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of the pairs, whose names have to differ and to be text."""
    table = dict(pairs)
    if not all(map(str.isascii, table)):
        "".join(table).encode()  # names are printed, which half a surrogate cannot be
    if len(table) < len(pairs):
        names = [name[:20] for name, _ in pairs[:10]]
        raise ValueError(f"a name appears twice in an object, which begins {names}")
    return table


def no_number(word: str) -> float:
    """Refuses NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{word} is no JSON number")


def finite(digits: str) -> float:
    """The number, which Python's floats hold."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


TOO_DEEP = f"lists or objects are nested more than {DEPTH} deep"
DECODER = json.JSONDecoder(
    object_pairs_hook=unique, parse_constant=no_number, parse_float=finite
)
