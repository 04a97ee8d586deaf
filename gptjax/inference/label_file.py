"""Classification of every row of a file, which may be larger than memory.

Rows are read strictly, in batches, and written in their order.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from gptjax.data.readers import (
    DELIMITERS,
    TABLE_FORMATS,
    check_object,
    guess_text_column,
    read_lines,
    read_rows,
    require_text,
    suffix_without_gz,
)
from gptjax.errors import DataError
from gptjax.fileio.atomic import open_atomic

INPUT_SUFFIXES = (*TABLE_FORMATS, ".txt")
OUTPUT_SUFFIXES = (*DELIMITERS, ".jsonl")
ADDED_COLUMNS = ("label", "probability")
PROBABILITY_DIGITS = 6  # decimal places

PredictFn = Callable[[list[str]], list[tuple[str, float]]]


class InputRow(NamedTuple):
    """Input row with its location."""

    location: str  # "file:line" or "file, row N"
    row: dict[str, Any]


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

    A .csv or .tsv file needs a header; JSON files have objects and .txt files one text
    per line; blank lines are skipped. The new columns are appended as label and
    probability, or as predicted_label and predicted_probability if one of these exists.

    Args:
        source: input file, optionally gzipped.
        output: its suffix determines the format; must not exist.
        predict: returns (label, probability) of each text.
        text_column: "" = guess.
        batch_size: texts per call of `predict`.
        log: receives messages for the user.
    """
    check_label_paths(source, output)
    rows = read_input_rows(source)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} has no rows. Pass a file with one text per row.")
    column = text_column or guess_text_column(first.row, first.location, "--text NAME")
    if not text_column:
        log(f"{source}: text in column {column!r}. Override with --text NAME.")
    prefix = "predicted_" if set(ADDED_COLUMNS) & set(first.row) else ""
    new_columns = tuple(prefix + name for name in ADDED_COLUMNS)
    check_columns_free(first, new_columns)
    rows, count = itertools.chain([first], rows), 0
    bar = tqdm(desc=f"classifying {source.name}", unit=" rows", leave=False, disable=None)
    with open_atomic(output) as file, bar:
        write_row = make_row_writer(file, output, [*first.row, *new_columns])
        while batch := list(itertools.islice(rows, batch_size)):
            texts = [
                require_text(item.row, column, item.location, option="--text NAME")
                for item in batch
            ]
            predictions = predict(texts)
            for row, (label, probability) in zip(batch, predictions, strict=True):
                added = (label, round(float(probability), PROBABILITY_DIGITS))
                write_row(row, dict(zip(new_columns, added, strict=True)))
            count += len(batch)
            bar.update(len(batch))
    log(f"wrote {output}: {count:,} rows, new columns {' and '.join(new_columns)}")
    return count


def check_label_paths(source: Path, output: Path) -> None:
    """Rejects unsupported file suffixes and an existing output file."""
    suffix = suffix_without_gz(source)
    if suffix not in INPUT_SUFFIXES:
        raise DataError(
            f"{source}: unsupported file suffix. Supported: {', '.join(INPUT_SUFFIXES)} (also .gz)."
        )
    # JSON objects may be nested or differ in their keys, so CSV cannot store them.
    suffixes = (".jsonl",) if suffix in (".json", ".jsonl") else OUTPUT_SUFFIXES
    if output.suffix.lower() not in suffixes:
        raise DataError(
            f"{output}: unsupported output format for {source.name}. Use the suffix "
            f"{' or '.join(suffixes)}."
        )
    if output.exists():
        raise DataError(f"{output} already exists. Remove it, or choose another name.")


def read_input_rows(path: Path) -> Iterator[InputRow]:
    """Yields the rows of a file."""
    if suffix_without_gz(path) == ".txt":
        lines = ((n, line.rstrip("\r\n")) for n, line in read_lines(path))
        rows = ((f"{path}:{n}", {"text": line}) for n, line in lines if line.strip())
    else:
        rows = read_rows(path)
    for location, row in rows:
        check_object(row, location, 'Write each row as {"text": "..."}.')
        yield InputRow(location, row)


def check_columns_free(item: InputRow, new_columns: tuple[str, ...] | dict[str, Any]) -> None:
    """Raises a DataError if the row already has one of the new columns."""
    for name in new_columns:
        if name in item.row:
            raise DataError(
                f"{item.location}: the column {name!r} already exists and would be "
                "overwritten. Rename or remove it."
            )


def make_row_writer(
    file: TextIO, output: Path, columns: list[str]
) -> Callable[[InputRow, dict[str, Any]], None]:
    """Returns a function that writes a row with its new columns."""
    if output.suffix.lower() == ".jsonl":

        def write_object(item: InputRow, added: dict[str, Any]) -> None:
            check_columns_free(item, added)
            file.write(json.dumps(item.row | added, ensure_ascii=False) + "\n")

        return write_object

    # Python before 3.13 quotes a lone \r only if the line terminator contains it.
    line_writer = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
    delimiter = DELIMITERS[output.suffix.lower()]
    writer = csv.writer(line_writer, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(columns)
    return lambda item, added: writer.writerow([*item.row.values(), *added.values()])
