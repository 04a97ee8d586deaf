"""Strict readers for .jsonl, .json and .csv files.

Nothing is guessed, repaired or skipped: invalid UTF-8, JSON or CSV raises an error
with file and line.
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
from gptjax.fileio.strict_json import decode_json_at

READ_BLOCK_BYTES = 1 << 18  # per read
MAX_LINE_BYTES = 64 << 20  # per line and per CSV field
MAX_JSON_CHARS = 1 << 30  # per .json file, which is read into memory
JSON_WHITESPACE = re.compile(r"[ \t\r\n]*")

NumberedRow = tuple[int, Any]  # first line number; string, or dict by column


@contextlib.contextmanager
def open_decompressed(path: Path) -> Iterator[tuple[BufferedIOBase, BufferedIOBase]]:
    """Opens a file for reading: the decompressed stream and the raw one."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file, raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {error}. Check that the file exists and is complete."
        ) from error


def decode_utf8(blocks: Iterable[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Decodes blocks of bytes, which may split characters, to (first line, text)."""
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
                f"{path}:{line}: NUL character. The file may be binary or UTF-16; save it as UTF-8."
            )
        if text:
            yield line, text
            line += text.count("\n")


def read_blocks(file: BufferedIOBase) -> Iterator[bytes]:
    """Yields the content of a file in blocks."""
    return iter(lambda: file.read(READ_BLOCK_BYTES), b"")


def read_lines(file: BufferedIOBase, path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line including its line ending)."""

    def lines() -> Iterator[bytes]:
        for number in itertools.count(1):
            block = file.readline(MAX_LINE_BYTES + 1)
            if not block:
                return
            if len(block) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}:{number}: line of more than {MAX_LINE_BYTES:,} bytes. "
                    "Write one row per line, or put a long text into a .txt file."
                )
            yield block

    return decode_utf8(lines(), path)


def read_jsonl(file: BufferedIOBase, path: Path) -> Iterator[NumberedRow]:
    """Yields the JSON value of each non-blank line."""
    for line, text in read_lines(file, path):
        if text := text.strip():
            row, end = next_json_value(text, 0, path, line)
            if end < len(text):
                raise DataError(
                    f"{path}:{line}: {text[end : end + 20]!r} after the JSON value. "
                    "Write one row per line."
                )
            yield line, row


def read_json_array(file: BufferedIOBase, path: Path) -> Iterator[NumberedRow]:
    """Yields the items of a file that holds one JSON array."""
    text = read_json_text(file, path)

    def skip_whitespace(start: int) -> tuple[int, str]:
        """Returns (position, character) after any whitespace."""
        spaces = JSON_WHITESPACE.match(text, start)
        start = spaces.end() if spaces else start
        return start, text[start : start + 1]

    position, char = skip_whitespace(0)
    if char != "[":
        raise DataError(f"{path}:1: not a JSON array. Put the rows between [ and ].")
    line, counted = 1, 0
    end, char = skip_whitespace(position + 1)
    while char != "]":
        start, _ = skip_whitespace(position + 1)
        line, counted = line + text.count("\n", counted, start), start
        row, end = next_json_value(text, start, path, line)
        yield line, row
        position, char = skip_whitespace(end)
        if char != ",":
            end = position
            break
    line += text.count("\n", counted, end)
    if char != "]" or skip_whitespace(end + 1)[1]:
        raise DataError(f"{path}:{line}: expected a comma or the closing ] of the array.")


def read_json_text(file: BufferedIOBase, path: Path) -> str:
    """Reads a whole .json file, up to `MAX_JSON_CHARS` characters."""
    texts, count = [], 0
    for _, text in decode_utf8(read_blocks(file), path):
        texts.append(text)
        count += len(text)
        if count > MAX_JSON_CHARS:
            raise DataError(
                f"{path} has more than {MAX_JSON_CHARS:,} characters, too many for a "
                ".json file. Write it as .jsonl, one row per line."
            )
    return "".join(texts)


def next_json_value(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """Decodes the JSON value at `start`, on line `line`; returns (value, end)."""
    try:
        return decode_json_at(text, start)
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise DataError(f"{path}:{line}: not JSON: {error.msg}.") from error
    except ValueError as error:  # such as an integer with thousands of digits
        raise DataError(f"{path}:{line}: not JSON: {error}.") from error


def read_csv(file: BufferedIOBase, path: Path) -> Iterator[NumberedRow]:
    """Yields each row as a dict by the names in the header; fields may span lines."""
    names = None
    for line, fields in read_csv_records(file, path):
        if names is None:
            names = fields
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: duplicate column name in {names}.")
        elif fields:  # not a blank line
            if len(fields) != len(names):
                raise DataError(
                    f"{path}:{line}: {len(fields)} fields, but {len(names)} columns "
                    'in the header. Quote text that contains commas: "a, b".'
                )
            yield line, dict(zip(names, fields, strict=True))


def read_csv_records(
    file: BufferedIOBase, path: Path, delimiter: str = ",", strict: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yields (first line, fields) of each row; a blank line has no fields.

    Args:
        file: decompressed bytes.
        path: name for error messages.
        delimiter: between fields.
        strict: raise on text after a closing quote instead of adding it to the field.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # process-wide; default 131,072
    # Decoded text has no NUL, so this row is the last one unless a quote is still open.
    end = "\0"
    lines = itertools.chain((text for _, text in read_lines(file, path)), [end])
    reader = csv.reader(lines, delimiter=delimiter, strict=strict)
    line = 1
    try:
        for fields in reader:
            if fields and fields[-1].endswith(end):
                if reader.line_num > line:
                    raise csv.Error("quote is never closed")
                return
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}.") from error


READERS: dict[str, Callable[[BufferedIOBase, Path], Iterator[NumberedRow]]] = {
    "jsonl": read_jsonl,
    "json": read_json_array,
    "csv": read_csv,
}
