"""Classification of every row of a file, which may be larger than memory.

Rows are read strictly, in batches, and written in their order.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from gptjax.data.readers import (
    DELIMITERS,
    TABLE_FORMATS,
    LocatedRow,
    check_object,
    guess_text_column,
    read_lines,
    read_rows,
    require_text,
    suffix_without_gz,
)
from gptjax.errors import DataError
from gptjax.fileio.atomic import open_atomic
from gptjax.runtime.terminal import logger
from gptjax.runtime.timing import log_progress

INPUT_SUFFIXES = (*TABLE_FORMATS, ".txt")
OUTPUT_SUFFIXES = (*DELIMITERS, ".jsonl")
ADDED_COLUMNS = ("label", "probability")
PROBABILITY_DIGITS = 6  # decimal places

PredictFn = Callable[[list[str]], list[tuple[str, float]]]  # label and probability of each text


def label_file(
    source: Path,
    output: Path,
    predict: PredictFn,
    *,
    text_column: str = "",
    usual_column: str = "",
    batch_size: int = 256,
) -> int:
    """Adds a predicted label and its probability to each row; returns the row count.

    A .csv or .tsv file needs a header; JSON files have objects and .txt files one text
    per line; blank lines are skipped. The new columns are called label and probability,
    or predicted_label and predicted_probability if the first row has one of these.

    `source` may be gzipped and the suffix of `output` determines its format. An empty
    `text_column` is the `usual_column` if the rows have it, else guessed. `predict`
    labels `batch_size` texts per call.
    """
    check_label_paths(source, output)
    rows, option = read_input_rows(source), "--text NAME"
    location, first = next(rows, ("", None))
    if first is None:
        raise DataError(f"{source} has no rows. Pass a file with one text per row.")
    column = text_column or usual_column * (usual_column in first)
    column = column or guess_text_column(first, location, option)
    if not text_column:
        logger.info(f"{source}: text in column {column!r}. Override with {option}.")
    prefix = "predicted_" if set(ADDED_COLUMNS) & set(first) else ""
    label, probability = (prefix + name for name in ADDED_COLUMNS)
    rows = log_progress(itertools.chain([(location, first)], rows), None, "labeling", "rows")
    count = 0
    with open_atomic(output) as file:
        write_row = make_row_writer(file, output, [*first, label, probability])
        while batch := list(itertools.islice(rows, batch_size)):
            texts = [require_text(row, column, place, option=option) for place, row in batch]
            for (place, row), prediction in zip(batch, predict(texts), strict=True):
                if existing := {label, probability} & set(row):
                    raise DataError(
                        f"{place}: the column {min(existing)!r} already exists and would be "
                        "overwritten. Rename or remove it."
                    )
                row[label] = prediction[0]
                row[probability] = round(float(prediction[1]), PROBABILITY_DIGITS)
                write_row(row)
            count += len(batch)
    logger.info(f"wrote {output}: {count:,} rows, new columns {label} and {probability}")
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
        raise DataError(f"{output} cannot hold {source.name}. Use {' or '.join(suffixes)}.")
    if output.exists():
        raise DataError(f"{output} already exists. Remove it, or choose another name.")


def read_input_rows(path: Path) -> Iterator[LocatedRow]:
    """Yields the rows of a file."""
    if suffix_without_gz(path) == ".txt":
        lines = ((n, line.removesuffix("\n").removesuffix("\r")) for n, line in read_lines(path))
        rows = ((f"{path}:{n}", {"text": line}) for n, line in lines if line.strip())
    else:
        rows = read_rows(path)
    for location, row in rows:
        yield location, check_object(row, location, 'Write each row as {"text": "..."}.')


def make_row_writer(
    file: TextIO, output: Path, columns: list[str]
) -> Callable[[dict[str, Any]], object]:
    """Returns a function that writes a row."""
    if output.suffix.lower() == ".jsonl":
        return lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
    # Python before 3.13 quotes a lone \r only if the line terminator contains it.
    line_writer = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
    delimiter = DELIMITERS[output.suffix.lower()]
    writer = csv.writer(line_writer, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(columns)
    return lambda row: writer.writerow(row.values())
