"""Classification of every row of a file, which may be larger than memory.

Rows are parsed strictly, in batches, and written in their order. The output is written
to NAME.part and renamed when complete.
"""

import csv
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

from gptjax.data.classification import (
    DELIMITERS,
    FIELD_COUNT_ADVICE,
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    known_column,
)
from gptjax.data.readers import open_decompressed, read_csv_records, read_jsonl, read_lines
from gptjax.data.text import get_row_text, suffix_without_gz
from gptjax.errors import DataError
from gptjax.fileio.atomic import open_atomic
from gptjax.fileio.download import PROGRESS_BAR_SECONDS, clear_progress_bar, draw_progress_bar

INPUT_KINDS = (*DELIMITERS, ".jsonl", ".txt")
OUTPUT_KINDS = (*DELIMITERS, ".jsonl")
ADDED_COLUMNS = ("label", "probability")
PROBABILITY_DIGITS = 6  # decimal places

PredictFn = Callable[[list[str]], list[tuple[str, float]]]


class InputRow(NamedTuple):
    """Input row with its location."""

    location: str  # "file:line"
    row: dict[str, Any]
    progress: float  # fraction of the file read so far


def label_file(
    source: Path,
    output: Path,
    predict: PredictFn,
    *,
    text_column: str = "",
    batch_size: int = 256,
    log: Callable[[str], None] = print,
) -> int:
    """Adds a predicted label and its probability to each row; returns the row count.

    A .csv or .tsv file needs a header; .jsonl files have one object and .txt files one
    text per line; blank lines are skipped. The new columns are appended as label and
    probability, or as predicted_label and predicted_probability if one of these exists.

    Args:
        source: input file, optionally gzipped.
        output: output file, its suffix determines the format; must not exist.
        predict: returns (label, probability) of each text.
        text_column: "" = guess.
        batch_size: texts per call of `predict`.
        log: receives messages for the user.

    Raises:
        DataError: a row or the column is invalid, or reading or writing failed. No
            output file is left behind.
    """
    check_label_paths(source, output)
    items = read_input_rows(source)
    first = next(items, None)
    if first is None:
        raise DataError(f"{source} has no rows. Pass a file with one text per row.")
    column = text_column or guess_text_column(first)
    if not text_column:
        log(f"{source}: text in column {column!r}. Override with --text NAME.")
    new_columns = added_columns(first)
    items = itertools.chain([first], items)
    count, last_drawn = 0, time.monotonic()
    try:
        with open_atomic(output) as file:
            write_row = make_writer(file, output, [*first.row, *new_columns])
            while chunk := list(itertools.islice(items, batch_size)):
                predictions = predict([get_text(item, column) for item in chunk])
                for item, (label, probability) in zip(chunk, predictions, strict=True):
                    new = (label, round(float(probability), PROBABILITY_DIGITS))
                    write_row(item, dict(zip(new_columns, new, strict=True)))
                count += len(chunk)
                if time.monotonic() - last_drawn > PROGRESS_BAR_SECONDS and sys.stderr.isatty():
                    last_drawn = time.monotonic()
                    draw_progress_bar(f"classifying {source.name}", chunk[-1].progress)
    finally:
        clear_progress_bar()
    log(f"wrote {output}: {count:,} rows, new columns {' and '.join(new_columns)}")
    return count


def check_label_paths(source: Path, output: Path) -> None:
    """Rejects unsupported file suffixes and an existing output file."""
    if suffix_without_gz(source) not in INPUT_KINDS:
        raise DataError(
            f"{source}: unsupported file suffix. Supported: {', '.join(INPUT_KINDS)} (also .gz)."
        )
    # JSON objects may be nested or differ in their keys, so CSV cannot store them.
    kinds = (".jsonl",) if suffix_without_gz(source) == ".jsonl" else OUTPUT_KINDS
    if output.suffix.lower() not in kinds:
        raise DataError(
            f"{output}: unsupported output format for {source.name}. Use the suffix "
            f"{' or '.join(kinds)}."
        )
    if output.exists():
        raise DataError(f"{output} already exists. Remove it, or choose another name.")


def read_input_rows(path: Path) -> Iterator[InputRow]:
    """Yields the rows of a file."""
    with open_decompressed(path) as (file, raw):
        size = max(1, path.stat().st_size)
        if suffix_without_gz(path) == ".jsonl":
            rows = read_jsonl(file, path)
        elif suffix_without_gz(path) == ".txt":
            lines = ((n, line.rstrip("\r\n")) for n, line in read_lines(file, path))
            rows = ((n, {"text": line}) for n, line in lines if line.strip())
        else:
            delimiter = DELIMITERS[suffix_without_gz(path)]
            records = read_csv_records(file, path, delimiter, strict=delimiter == ",")
            rows = rows_with_header(records, path, delimiter)
        for line, row in rows:
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{line}: {row!r:.40} has no columns. Write each row as "
                    '{"text": "..."}.'
                )
            yield InputRow(f"{path}:{line}", row, raw.tell() / size)


def rows_with_header(
    records: Iterator[tuple[int, list[str]]], path: Path, delimiter: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line, row), with column names from the first row."""
    nonblank = ((line, fields) for line, fields in records if fields)
    line, columns = next(nonblank, (1, []))
    columns = [name.strip() for name in columns]
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}:{line}: duplicate column name in {columns}.")
    for line, fields in nonblank:
        if len(fields) != len(columns):
            raise DataError(
                f"{path}:{line}: {len(fields)} fields under {len(columns)} column "
                f"names. {FIELD_COUNT_ADVICE[delimiter]}"
            )
        yield line, dict(zip(columns, fields, strict=True))


def guess_text_column(item: InputRow) -> str:
    """Returns the text column: one with a known name, or the only string column."""
    strings = [name for name, value in item.row.items() if isinstance(value, str)]
    known_name = known_column(strings, TEXT_COLUMNS)
    candidates = [name for name in strings if name.strip().lower() not in LABEL_COLUMNS]
    if not known_name and len(candidates) != 1:
        raise DataError(
            f"{item.location}: ambiguous text column; string columns: "
            f"{', '.join(strings) or 'none'}. Choose with --text NAME."
        )
    return known_name or candidates[0]


def get_text(item: InputRow, column: str) -> str:
    """Returns the text of a row, which must not be blank."""
    if column not in item.row:
        raise DataError(
            f"{item.location}: no column {column!r}. Columns: "
            f"{', '.join(item.row) or 'none'}. Choose with --text NAME."
        )
    text = get_row_text(item.row, column, item.location)
    if not text.strip():
        raise DataError(f"{item.location}: the text is empty. Add text, or remove the row.")
    return text


def added_columns(item: InputRow) -> tuple[str, ...]:
    """Returns names of the two new columns that are not in the row."""
    new_columns = ADDED_COLUMNS
    if set(new_columns) & set(item.row):
        new_columns = tuple(f"predicted_{name}" for name in ADDED_COLUMNS)
    check_columns_free(item, new_columns)
    return new_columns


def check_columns_free(item: InputRow, new_columns: tuple[str, ...] | dict[str, Any]) -> None:
    """Raises a DataError if the row already has one of the new columns."""
    for name in new_columns:
        if name in item.row:
            raise DataError(
                f"{item.location}: the column {name!r} already exists and would be "
                "overwritten. Rename or remove it."
            )


def make_writer(
    file: TextIO, output: Path, columns: list[str]
) -> Callable[[InputRow, dict[str, Any]], None]:
    """Returns a function that writes a row with its new columns."""
    if output.suffix.lower() == ".jsonl":

        def write_object(item: InputRow, added: dict[str, Any]) -> None:
            check_columns_free(item, added)
            row = item.row | added
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            except ValueError as error:  # 1e999 was parsed as infinity
                raise DataError(
                    f"{item.location}: JSON does not support non-finite numbers. "
                    "Replace the number."
                ) from error
            file.write(line + "\n")

        return write_object

    # Python before 3.13 quotes a lone \r only if the line terminator contains it.
    line_writer = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
    delimiter = DELIMITERS[output.suffix.lower()]
    writer = csv.writer(line_writer, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(columns)

    def write_fields(item: InputRow, added: dict[str, Any]) -> None:
        writer.writerow([*item.row.values(), *added.values()])

    return write_fields
