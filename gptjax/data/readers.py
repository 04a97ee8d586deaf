r"""Strict readers of tables (.jsonl, .json, .csv, .tsv) and text, also gzipped.

Nothing is repaired or skipped: invalid UTF-8, JSON or CSV raises an error with file and
line. Lines end with \n or \r\n only. CSV is parsed strictly, TSV like pandas does by
default: a field that starts with a quote extends to the closing quote, across line ends
too.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import re
import shlex
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import did_you_mean
from gptjax.data.datasets import DATASETS, PYTHON_HELP, fetch_dataset
from gptjax.errors import DataError
from gptjax.fileio.paths import user_path
from gptjax.fileio.strict_json import open_regular_file, parse_json

DELIMITERS = {".csv": ",", ".tsv": "\t"}
DELIMITER_NAMES = {",": "comma-separated", ";": "semicolon-separated", "\t": "tab-separated"}
TABLE_FORMATS = {".jsonl": "JSON lines", ".json": "JSON list"}
TABLE_FORMATS |= {suffix: DELIMITER_NAMES[char] for suffix, char in DELIMITERS.items()}
SMS_SPAM_FILE = DATASETS["sms-spam"].file_name  # tab-separated, without suffix and header
READ_BLOCK_BYTES = 1 << 18  # per read
BOM_ENCODINGS = {  # UTF-32's mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MAX_LINE_CHARS = 64 << 20  # per line and per CSV field
MAX_JSON_BLOCKS = 1 << 12  # per .json file, 1 GiB
EMPTY_VALUES = (None, "", [], {}, "[]", "{}")
MAX_LISTED_COLUMNS = 20  # columns listed by name in a summary
# Usual column names; the first is preferred to the others.
TEXT_COLUMNS = ("text", "sentence", "content", "message", "review", "document", "sms")
TEXT_COLUMNS += ("comment", "tweet", "body", "question", "headline")
LABEL_COLUMNS = ("label", "class", "target", "category", "sentiment", "labels")
LABEL_COLUMNS += ("intent", "topic", "polarity", "rating", "stars")
# Values by which other programs exclude or weight a row: patterns by the column's name,
# all in lower case.
TRUE_VALUE, FALSE_VALUE = r"true|1(\.0*)?", r"false|0(\.0*)?"
EXCLUDING_VALUES = dict.fromkeys(("train", "is_train", "loss"), FALSE_VALUE)
EXCLUDING_VALUES |= dict.fromkeys(("mask", "is_test"), TRUE_VALUE)
EXCLUDING_VALUES |= dict.fromkeys(("weight", "loss_weight"), rf"(?!({TRUE_VALUE})$).*")
EXCLUDING_VALUES |= {"split": "(?!train$).*", "set": "val|valid|validation|dev|test"}

LocatedRow = tuple[str, Any]  # "file:line" or "file, row N"; string, or dict by column


@contextlib.contextmanager
def open_decompressed(path: Path) -> Iterator[BufferedIOBase]:
    """Opens a file for reading, decompressed if it ends in .gz."""
    try:
        with open_regular_file(path) as file:
            if path.suffix.lower() != ".gz":
                yield file
            elif file.peek(1):
                yield gzip.GzipFile(fileobj=file)
            else:
                raise EOFError("it is empty")  # gzip reads it as an empty text
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {error}. Check that the file exists and is complete."
        ) from error


def suffix_without_gz(path: Path) -> str:
    """Returns the lower-case file extension, ignoring .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def visible_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Returns the files with these extensions in a folder tree, without hidden ones.

    Links to folders are followed. A folder that can be reached in several ways is read
    once, and the folders that contain `folder` are not read, so that no link is a loop.
    """
    files, pending, seen = [], deque([folder]), {*folder.resolve().parents}
    try:
        while pending:
            if (real := (current := pending.popleft()).resolve()) in seen:
                continue
            seen.add(real)
            for path in sorted(current.iterdir()):
                if path.name.startswith("."):
                    continue
                if not path.is_dir():
                    if suffix_without_gz(path) in suffixes and path.is_file():
                        files.append(path)
                elif path.is_symlink():
                    pending.append(path)  # last, so that a folder in the tree has its own path
                else:
                    pending.appendleft(path)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}. Make it readable."
        ) from error
    return sorted(files)


def find_table(path: str, datasets: Sequence[str], content: str, alternative: str = "") -> Path:
    """Returns the file of a data set name or a path.

    `content` of the data sets, and an `alternative` to a table, are for error messages.
    """
    if path in datasets:
        return fetch_dataset(path)
    file = user_path(path)
    is_other_dataset = path in (PYTHON_HELP, *DATASETS)
    if is_other_dataset or not file.is_file() or table_suffix(file) not in TABLE_FORMATS:
        is_there = is_other_dataset or file.exists()
        problem = f"is not a table of {content}" if is_there else "does not exist"
        raise DataError(
            f"{path} {problem}. Pass a {', '.join(TABLE_FORMATS)} file (also .gz)"
            f"{alternative} or one of the data sets {', '.join(datasets)}."
        )
    return file


def table_suffix(path: Path) -> str:
    """Returns the suffix that determines the format of a table."""
    is_sms_spam = path.name.removesuffix(".gz") == SMS_SPAM_FILE
    return ".tsv" if is_sms_spam else suffix_without_gz(path)


def table_format(path: Path) -> str:
    """Returns the name of a table's format."""
    suffix = table_suffix(path)
    return DELIMITER_NAMES[find_delimiter(path)] if suffix in DELIMITERS else TABLE_FORMATS[suffix]


def find_delimiter(path: Path) -> str:
    """Finds the delimiter: the usual one, unless the header has only another."""
    usual = DELIMITERS[table_suffix(path)]
    header = next((text for _, text in read_lines(path) if text.strip()), "")
    unquoted = re.sub('"[^"]*"', "", header)
    return next((char for char in (usual, *DELIMITER_NAMES) if char in unquoted), usual)


def read_text_file(path: Path) -> str:
    """Reads a whole UTF-8 text file with any file extension."""
    return "".join(read_text_blocks(path))


def read_text_blocks(path: Path) -> Iterator[str]:
    """Yields the content of a UTF-8 text file in blocks."""
    with open_decompressed(path) as file:
        blocks = iter(lambda: file.read(READ_BLOCK_BYTES), b"")
        yield from (text for _, text in decode_utf8(blocks, path))


def count_chars(path: Path) -> int:
    """Counts the characters of a UTF-8 text file, without decoding it."""
    with open_decompressed(path) as file:
        count = -file.read(3).startswith(codecs.BOM_UTF8)
        file.seek(0)
        while block := file.read(READ_BLOCK_BYTES):  # continuation bytes are 0x80 to 0xBF
            count += int(np.count_nonzero(np.frombuffer(block, np.int8) >= -64))
    return count


def decode_utf8(blocks: Iterable[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Decodes blocks of bytes, which may split characters, to (first line, text)."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    for block in itertools.chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            encodings = (x for bom, x in BOM_ENCODINGS.items() if error.object.startswith(bom))
            encoding = next(encodings, "latin1")
            line += error.object.count(b"\n", 0, error.start)
            raise DataError(
                f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}: "
                f"{error.reason}). Convert it, for example: iconv -f {encoding} -t utf-8 "
                f"{shlex.quote(str(path))} > NEW_FILE"
            ) from error
        if "\0" in text:
            line += text.count("\n", 0, text.index("\0"))
            raise DataError(
                f"{path}:{line}: NUL character. The file may be binary or UTF-16; save it as UTF-8."
            )
        if text:
            yield line, text
            line += text.count("\n")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line including its line ending)."""
    number, parts, size = 1, [], 0  # of the line that continues in the next block
    for text in read_text_blocks(path):
        start = 0
        while end := text.find("\n", start) + 1:
            yield number, "".join([*parts, text[start:end]])
            number, parts, size, start = number + 1, [], 0, end
        parts.append(text[start:])
        size += len(parts[-1])
        if size > MAX_LINE_CHARS:
            raise DataError(
                f"{path}:{number}: line of more than {MAX_LINE_CHARS:,} characters. Write one row "
                "per line, or put a long text into a .txt file."
            )
    if size:
        yield number, "".join(parts)


def read_rows(path: Path) -> Iterator[LocatedRow]:
    """Yields the rows of a table in one of the `TABLE_FORMATS`.

    The first row of a CSV or TSV file is its header.
    """
    match table_suffix(path):
        case ".jsonl":
            return read_jsonl(path)
        case ".json":
            return read_json_array(path)
        case _:
            return name_columns(read_csv_records(path))


def read_jsonl(path: Path) -> Iterator[LocatedRow]:
    """Yields the JSON value of each non-blank line."""
    for line, text in read_lines(path):
        if text := text.strip(" \t\r\n"):  # other blanks are not JSON
            yield f"{path}:{line}", parse_located_json(text, path, line)


def read_json_array(path: Path) -> Iterator[LocatedRow]:
    """Yields the items of a file that holds one JSON array; reads it into memory."""
    blocks = read_text_blocks(path)
    text = "".join(itertools.islice(blocks, MAX_JSON_BLOCKS))
    if next(blocks, None) is not None:
        raise DataError(
            f"{path} has more than {MAX_JSON_BLOCKS * READ_BLOCK_BYTES:,} bytes, too many "
            "for a .json file. Write it as .jsonl, one row per line."
        )
    rows = parse_located_json(text, path, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path}:1: not a JSON array. Put the rows between [ and ].")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def parse_located_json(text: str, path: Path, line: int) -> Any:
    """Parses the JSON value that starts on a line of a file."""
    try:
        return parse_json(text)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = line + error.lineno - 1, error.msg
        raise DataError(f"{path}:{line}: not JSON: {reason}.") from error


def read_csv_records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (location, fields) of each row that is not blank, such as ";;;".

    All rows must have as many fields as the first.
    """
    delimiter = find_delimiter(path)
    csv.field_size_limit(MAX_LINE_CHARS)  # process-wide; default 131,072
    # Decoded text has no NUL, so this row is the last one unless a quote is still open.
    end = "\0"
    lines = itertools.chain((text for _, text in read_lines(path)), [end])
    reader = csv.reader(lines, delimiter=delimiter, strict=delimiter != "\t")
    line, width = 1, 0
    try:
        for fields in reader:
            if fields and fields[-1].endswith(end):
                if reader.line_num > line:
                    raise csv.Error("quote is never closed")
                return
            if line == 1 and fields[:1] == ["sep="]:  # Excel names the delimiter
                fields = []
            width = width or len(fields)
            if len(fields) not in (0, width):
                raise DataError(
                    f"{path}:{line}: {len(fields)} fields, but {width} in the first "
                    f"row. Put a text that contains {delimiter!r} in double quotes."
                )
            if len(fields) == 1 or any(map(str.strip, fields)):
                yield f"{path}:{line}", fields
            line = reader.line_num + 1
    except csv.Error as error:
        reason = str(error)  # the error itself would be in a cycle with its frame
        if "new-line character" in reason:
            reason = r"a line ends with \r. Save it with \n or \r\n"
        raise DataError(f"{path}:{line}: not CSV: {reason}.") from error


def column_names(fields: Sequence[str]) -> list[str]:
    """Returns the names in a header, with the number of a column that has no name."""
    return [name.strip() or str(number) for number, name in enumerate(fields, 1)]


def name_columns(records: Iterable[tuple[str, list[str]]]) -> Iterator[LocatedRow]:
    """Yields each record as a dict by the names in the first one."""
    records = iter(records)
    location, header = next(records, ("", []))
    names = column_names(header)
    if len(set(names)) < len(names):
        raise DataError(f"{location}: duplicate column name in {names!s:.200}.")
    for location, fields in records:
        yield location, dict(zip(names, fields, strict=True))


def unread_columns(
    row: Mapping[str, Any],
    read: Collection[str],
    location: str = "",
    excluding: Mapping[str, str] = EXCLUDING_VALUES,
    path: str = "",
) -> list[str]:
    """Returns the columns, after `path`, that have a value but are not in `read`.

    A value that training would have to honour, see `EXCLUDING_VALUES`, is an error. The
    text of an empty list, as in exported tables, is no value.
    """
    names = []
    for name, value in row.items():
        value = value.strip() if isinstance(value, str) else value
        if name in read or value in EMPTY_VALUES:
            continue
        names.append(path + name)
        pattern = excluding.get(name.strip().lower())
        if pattern and re.fullmatch(pattern, str(value).lower(), re.DOTALL):
            raise DataError(
                f"{location}: {path + name!r} is {value!r:.40}, which training would ignore. "
                "Remove the row, rename the key, or move its text to one that is read."
            )
    return names


def describe_unread(counts: Mapping[str, int]) -> str:
    """Lists columns that are not read, with the number of rows that have them.

    >>> describe_unread({"id": 1200, "date": 3})
    '; not read: id (1,200), date (3)'
    """
    listed = [
        f"{name:.40} ({n:,})" for name, n in itertools.islice(counts.items(), MAX_LISTED_COLUMNS)
    ]
    listed += [f"{len(counts) - len(listed):,} more"] * (len(counts) > len(listed))
    return "; not read: " * bool(listed) + ", ".join(listed)


def check_object(row: Any, location: str, advice: str) -> dict[str, Any]:
    """Returns a row that must be an object with columns."""
    if not isinstance(row, dict):
        raise DataError(f"{location}: {row!r:.40} has no columns. {advice}")
    return row


def get_text(row: Any, column: str, location: str, option: str = "--column NAME") -> str:
    """Returns the text of one row: of a column, or if that is "", the row itself.

    `location` and `option`, which chooses the column, are for error messages.
    """
    if column and (not isinstance(row, dict) or column not in row):
        raise unknown_column_error(column, row if isinstance(row, dict) else (), location, option)
    text = row[column] if column else row
    if not isinstance(text, str):
        subject = f"column {column!r}" if column else "the row"
        raise DataError(f"{location}: {subject} is {text!r:.40}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: unpaired surrogate {text[error.start]!r}. Write the character itself."
        ) from error
    if "\0" in text:
        raise DataError(f"{location}: NUL character in the text. Remove it.")
    return text


def require_text(
    row: Any, column: str, location: str, expected: str = "text", option: str = "--column NAME"
) -> str:
    """Returns the text of one row, which must not be blank; see `get_text`."""
    text = get_text(row, column, location, option)
    if not text.strip():
        raise DataError(f"{location}: {column!r} is empty. Add {expected}, or remove the row.")
    return text


def unknown_column_error(
    name: str, columns: Iterable[str], location: str, option: str
) -> DataError:
    """Returns the error for a missing column."""
    columns = list(columns)
    return DataError(
        f"{location}: no column {name!r}.{did_you_mean(name, columns)} Columns: "
        f"{', '.join(columns) or 'none'}. Choose with {option}."
    )


def find_column(columns: Sequence[str], names: Sequence[str]) -> str:
    """Returns the only column with a known name, else ""; `names[0]` is preferred."""
    for accepted in (names[:1], names):
        matches = [name for name in columns if name.strip().lower() in accepted]
        if len(matches) == 1:
            return matches[0]
    return ""


def guess_text_column(
    row: dict[str, Any], location: str, option: str, names: Sequence[str] = TEXT_COLUMNS
) -> str:
    """Guesses the text column: the one with a known name, or the only text."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    candidates = [name for name in strings if name.strip().lower() not in LABEL_COLUMNS]
    column = find_column(strings, names) or (candidates[0] if len(candidates) == 1 else "")
    if not column:
        raise DataError(
            f"{location}: ambiguous text column; string columns: "
            f"{', '.join(strings) or 'none'}. Choose with {option}."
        )
    return column
