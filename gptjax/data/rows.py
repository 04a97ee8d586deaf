"""Rows out of .jsonl, .json and .csv files, and their characters, strictly.

Nothing is guessed, repaired or skipped: what is not UTF-8, not JSON or not CSV is an
error that names the file and the line.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from gptjax.errors import DataError
from gptjax.strict_json import parse_at

BLOCK = 1 << 18  # bytes read at a time
LINE_BYTES = 64 << 20  # a longer line or CSV field is refused
JSON_CHARACTERS = 1 << 30  # a .json file is read whole, a larger one refused

Row = tuple[int, Any]  # line it starts in; string, or mapping of column to value


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedIOBase, BufferedIOBase]]:
    """The file's bytes, decompressed and as they are on disk."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file, raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {error}. Check that it is whole."
        ) from error


def strict_text(blocks: Iterable[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """(line it starts in, text) of each block of bytes, which may split characters."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    for block in itertools.chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise DataError(
                f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}: "
                f"{error.reason}). Save the file as UTF-8."
            ) from error
        if "\0" in text:
            line += text.count("\n", 0, text.index("\0"))
            raise DataError(
                f"{path}:{line}: a NUL character, which no text holds. Is the file "
                "binary or UTF-16? Save it as UTF-8."
            )
        if text:
            yield line, text
            line += text.count("\n")


def read_blocks(file: BufferedIOBase) -> Iterator[bytes]:
    """The file's bytes."""
    return iter(lambda: file.read(BLOCK), b"")


def read_lines(file: BufferedIOBase, path: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of each line."""

    def lines() -> Iterator[bytes]:
        for number in itertools.count(1):
            block = file.readline(LINE_BYTES + 1)
            if not block:
                return
            if len(block) > LINE_BYTES:
                raise DataError(
                    f"{path}:{number}: a line of more than {LINE_BYTES:,} bytes. Write "
                    "one row a line, or put a long text into a .txt file."
                )
            yield block

    return strict_text(lines(), path)


def jsonl_rows(file: BufferedIOBase, path: Path) -> Iterator[Row]:
    """The value of each line that is not blank."""
    for line, text in read_lines(file, path):
        if text := text.strip():
            row, end = json_value(text, 0, path, line)
            if end < len(text):
                raise DataError(
                    f"{path}:{line}: not one JSON value but {text[end : end + 20]!r} "
                    "after it. Write one row a line."
                )
            yield line, row


def json_rows(file: BufferedIOBase, path: Path) -> Iterator[Row]:
    """The items of the list that the whole file is."""
    text = whole_text(file, path)

    def mark_after(start: int) -> tuple[int, str]:
        """(position, character) of the first one that is no space."""
        spaces = SPACES.match(text, start)
        start = spaces.end() if spaces else start
        return start, text[start : start + 1]

    at, mark = mark_after(0)
    if mark != "[":
        raise DataError(f"{path}:1: not a list of rows. Put them between [ and ].")
    line, counted = 1, 0
    end, mark = mark_after(at + 1)
    while mark != "]":
        start, _ = mark_after(at + 1)
        line, counted = line + text.count("\n", counted, start), start
        row, end = json_value(text, start, path, line)
        yield line, row
        at, mark = mark_after(end)
        if mark != ",":
            end = at
            break
    line += text.count("\n", counted, end)
    if mark != "]" or mark_after(end + 1)[1]:
        raise DataError(
            f"{path}:{line}: the list does not go on with a comma or end with ]."
        )


def whole_text(file: BufferedIOBase, path: Path) -> str:
    """All characters of a file that is small enough for that."""
    texts, count = [], 0
    for _, text in strict_text(read_blocks(file), path):
        texts.append(text)
        count += len(text)
        if count > JSON_CHARACTERS:
            raise DataError(
                f"{path} has more than {JSON_CHARACTERS:,} characters, and a .json "
                "file is read whole. Write it as .jsonl, one row a line."
            )
    return "".join(texts)


def json_value(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """The JSON value at `start`, which is in `line`, and where it ends."""
    try:
        return parse_at(text, start)
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise DataError(f"{path}:{line}: not JSON: {error.msg}.") from error
    except ValueError as error:  # also of integers with thousands of digits
        raise DataError(f"{path}:{line}: not JSON: {error}.") from error


SPACES = re.compile(r"[ \t\r\n]*")


def csv_rows(file: BufferedIOBase, path: Path) -> Iterator[Row]:
    """Each row under the names of the first one; a field may span lines."""
    names = None
    for line, fields in field_lists(file, path):
        if names is None:
            names = fields
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: a column name appears twice: {names}.")
        elif fields:  # not a blank line
            if len(fields) != len(names):
                raise DataError(
                    f"{path}:{line}: {len(fields)} fields under {len(names)} "
                    'column names. Quote text that holds commas: "a, b".'
                )
            yield line, dict(zip(names, fields, strict=True))


def field_lists(
    file: BufferedIOBase, path: Path, delimiter: str = ",", strict: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """(line it starts in, fields) of each row, none for a blank line.

    Args:
        file: to read.
        path: its name, for errors.
        delimiter: between fields.
        strict: text after a closing quote mark is an error, not a part of the field.
    """
    csv.field_size_limit(LINE_BYTES)  # of the process; 131,072 where nobody sets it
    # No text holds a NUL, so that this last row stands alone unless a quote is open.
    end = "\0"
    lines = itertools.chain((text for _, text in read_lines(file, path)), [end])
    reader = csv.reader(lines, delimiter=delimiter, strict=strict)
    line = 1
    try:
        for fields in reader:
            if fields and fields[-1].endswith(end):
                if reader.line_num > line:
                    raise csv.Error("a quote mark is never closed")
                return
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}.") from error


ROWS: dict[str, Callable[[BufferedIOBase, Path], Iterator[Row]]] = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "csv": csv_rows,
}
