"""Labeled texts for classification, from tables and folders, and their batches.

The text and label columns of a table are guessed unless named; the returned description
states the choice. A folder contains one folder per label, with one .txt file per text.
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.bucketing import BucketedBatches
from gptjax.data.builtin import PYTHON_LINES, python_lines
from gptjax.data.readers import (
    DELIMITERS,
    LABEL_COLUMNS,
    TABLE_FORMATS,
    TEXT_COLUMNS,
    NumberedRow,
    check_object,
    find_column,
    find_table,
    get_text,
    name_columns,
    open_decompressed,
    read_csv_records,
    read_rows,
    read_text_file,
    suffix_without_gz,
    table_suffix,
    unknown_column_error,
)
from gptjax.errors import DataError

MAX_GUESSED_LABEL_CHARS = 50  # longest value in a guessed label column
MAX_LISTED_CLASSES = 8  # classes listed by name in a summary


@dataclasses.dataclass(frozen=True)
class LabeledTexts:
    """Texts with class labels."""

    texts: list[str]
    labels: list[int]  # indices into `class_names`
    class_names: tuple[str, ...]  # sorted, numbers by value
    locations: list[str]  # "file:line" of each text

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)


class RawTable(NamedTuple):
    """Rows of a file before the text and label columns are chosen."""

    path: Path
    format: str  # description for messages
    columns: list[str]
    rows: list[NumberedRow]

    def values(self, column: str) -> list[str]:
        """Returns the values of a column as strings."""
        return [str(row.get(column, "")) for _, row in self.rows]


def take(data: LabeledTexts, indices: Iterable[SupportsIndex]) -> LabeledTexts:
    """Returns the rows at `indices`, in this order, with the same classes."""
    chosen = list(indices)
    return dataclasses.replace(
        data,
        texts=[data.texts[i] for i in chosen],
        labels=[data.labels[i] for i in chosen],
        locations=[data.locations[i] for i in chosen],
    )


def read_labeled_texts(
    path: Path | str, text_column: str = "", label_column: str = ""
) -> tuple[LabeledTexts, str]:
    """Reads labeled texts; returns them with a one-line description.

    Args:
        path: a built-in data set, a table, or a folder with one folder per label.
        text_column: "" = guess. Columns without a header are numbered from 1.
        label_column: "" = guess.
    """
    if path == PYTHON_LINES:
        data = encode_labels(python_lines(), PYTHON_LINES)
        return data, f"lines of Python's standard library; {summarize_classes(data)}."
    source = Path(path).expanduser()
    if source.is_dir():
        if text_column or label_column:
            raise DataError(
                f"{source} is a folder and has no columns. Leave data.text_column and "
                "data.label_column empty, or pass a file."
            )
        data = encode_labels(folder_examples(source), str(source))
        return data, f"{source}: one folder of .txt files per label; {summarize_classes(data)}."
    folder = ", a folder with one folder of .txt files per label,"
    source = find_table(str(path), ("sms-spam",), "labels", folder)
    table = read_raw_table(source, {text_column, label_column} - {""})
    text_column, label_column = choose_columns(table, text_column, label_column)
    examples = []
    for line, row in table.rows:
        location = f"{source}:{line}"
        text = get_text(row, text_column, location, "--data.text_column NAME")
        examples.append((text, get_label(row, label_column, location), location))
    data = encode_labels(examples, f"{source}, column {label_column!r}")
    return data, (
        f"{source}: {table.format}; text in column {text_column!r}, label in column "
        f"{label_column!r}; {summarize_classes(data)}. "
        "Override with --data.text_column NAME --data.label_column NAME."
    )


def read_raw_table(path: Path, named_columns: set[str]) -> RawTable:
    """Reads all rows; columns named by the user help to detect a header."""
    file_format = TABLE_FORMATS[table_suffix(path)]
    with open_decompressed(path) as (file, _):
        if delimiter := DELIMITERS.get(table_suffix(path)):
            records = list(read_csv_records(file, path, delimiter))
            table = table_from_csv(path, file_format, records, named_columns)
        else:
            advice = 'Write each row as {"text": "...", "label": "..."}.'
            rows = [
                (n, check_object(row, f"{path}:{n}", advice)) for n, row in read_rows(file, path)
            ]
            table = RawTable(path, file_format, list(rows[0][1]) if rows else [], rows)
    if not table.rows:
        raise DataError(f"{path} has no rows. Pass a file with labeled texts.")
    return table


def table_from_csv(
    path: Path, file_format: str, records: list[tuple[int, list[str]]], named_columns: set[str]
) -> RawTable:
    """Returns the table of a CSV or TSV file; its first row may be a header."""
    num_columns = len(records[0][1]) if records else 0
    columns = [str(n + 1) for n in range(num_columns)]
    if not suffix_without_gz(path) and num_columns == 2:  # the SMS Spam Collection
        columns = ["label", "text"]
    rows = list(name_columns([(0, columns), *records], path))
    numbered = RawTable(path, f"{file_format}, no header", columns, rows)
    if "label" in columns or not rows or not has_header(numbered, named_columns):
        return numbered
    rows = list(name_columns(records, path))
    columns = [name.strip() for name in records[0][1]]
    return RawTable(path, f"{file_format}, with a header", columns, rows)


def has_header(table: RawTable, named_columns: set[str]) -> bool:
    """True if the first row of the table contains column names.

    False if the user numbers the columns, or if other rows repeat its label.
    """
    first_row = {name.strip() for name in table.rows[0][1].values()}
    known_names = {*TEXT_COLUMNS, *LABEL_COLUMNS}
    if named_columns & first_row or known_names & {name.lower() for name in first_row}:
        return True
    if named_columns and named_columns <= set(table.columns):
        return False
    column = guess_label_column(table)
    return not column or table.values(column)[0] not in table.values(column)[1:]


def guess_label_column(table: RawTable) -> str:
    """Returns the one of two columns that looks like labels, or ""."""
    if len(table.columns) != 2:
        return ""
    for candidate, other in (table.columns, table.columns[::-1]):
        labels, texts = table.values(candidate), table.values(other)
        if (
            2 * len(set(labels)) <= len(labels)
            and len(set(labels)) < len(set(texts))
            and sum(map(len, labels)) < sum(map(len, texts))
            and max(map(len, labels)) <= MAX_GUESSED_LABEL_CHARS
        ):
            return candidate
    return ""


def choose_columns(table: RawTable, text_column: str, label_column: str) -> tuple[str, str]:
    """Returns the text and the label column, guessed where they are ""."""
    columns = table.columns
    location = f"{table.path}:{table.rows[0][0]}"
    for option, name in (("text", text_column), ("label", label_column)):
        if name and name not in columns:
            raise unknown_column_error(name, columns, location, f"--data.{option}_column NAME")
    if text_column and text_column == label_column:
        raise DataError(
            f"data.text_column and data.label_column are both {text_column!r}. Choose "
            f"two of {', '.join(columns)}."
        )
    remaining = [name for name in columns if name not in (text_column, label_column)]
    text_column = text_column or find_column(remaining, TEXT_COLUMNS)
    label_column = label_column or find_column(remaining, LABEL_COLUMNS)
    remaining = [name for name in columns if name not in (text_column, label_column)]
    if len(columns) == 2 and not text_column:
        label_column = label_column or guess_label_column(table)
        text_column = "".join(set(columns) - {label_column}) if label_column else ""
    elif len(columns) == 2 and not label_column and remaining:  # none: its name is ""
        values = table.values(remaining[0])
        label_column = remaining[0] if len(set(values)) < len(values) else ""
    if not text_column or not label_column:
        raise DataError(
            f"{location}: ambiguous text and label columns; columns: "
            f"{', '.join(columns) or 'none'}. Choose with --data.text_column NAME "
            "--data.label_column NAME (without a header, numbers from 1)."
        )
    return text_column, label_column


def get_label(row: dict[str, Any], column: str, location: str) -> str:
    """Returns the label of a row as a stripped string."""
    value = row.get(column, "")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, dict | list):
        raise DataError(
            f"{location}: the label in column {column!r} is {value!r:.40}, not a "
            "string or a number. Each text needs exactly one label."
        )
    option = "--data.label_column NAME"
    label = "" if value is None else get_text(row, column, location, option).strip()
    if not label:
        raise DataError(f"{location}: no label in column {column!r}. Add one, or remove the row.")
    return label


def folder_examples(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (text, label, location) of each .txt file; its folder is the label."""
    texts = [
        path
        for path in sorted(folder.glob("*/**/*"))
        if suffix_without_gz(path) == ".txt"
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if nested := [path for path in texts if path.parent.parent != folder]:
        inner = nested[0].parent.parent
        raise DataError(
            f"{folder} contains {inner.name}, which has subfolders of texts. "
            f"Pass the folder whose subfolders are the labels, such as {inner}."
        )
    if not texts:
        raise DataError(
            f"{folder} has no folders of .txt files. Put each text into a folder named "
            f"after its label, such as {folder / 'spam' / '1.txt'}, or pass a file."
        )
    for file in texts:
        yield read_text_file(file), file.parent.name, f"{file}:1"


def encode_labels(rows: Iterable[tuple[str, str, str]], source: str) -> LabeledTexts:
    """Builds `LabeledTexts` of (text, label, location) rows; errors name `source`."""
    texts, labels, locations = map(list, zip(*rows, strict=True))
    for text, location in zip(texts, locations, strict=True):
        if not text.strip():
            raise DataError(f"{location}: the text is empty. Add text, or remove the row.")
    class_names = sorted(set(labels), key=class_sort_key)
    if len(class_names) < 2:
        raise DataError(
            f"{source}: the only label is {class_names[0]!r}, but a classifier needs "
            "at least two classes. Add rows of other classes, or choose the column "
            "with --data.label_column NAME."
        )
    class_ids = {name: number for number, name in enumerate(class_names)}
    return LabeledTexts(texts, [class_ids[x] for x in labels], tuple(class_names), locations)


def class_sort_key(name: str) -> tuple[int, float, str]:
    """Returns the sort key of a class name: numbers first, by value."""
    if re.fullmatch(r"-?\d{1,300}(\.\d+)?", name, re.ASCII):
        return 0, float(name), name
    return 1, 0.0, name


def summarize_classes(data: LabeledTexts) -> str:
    """Returns the number of texts per class as one line."""
    counts = Counter(data.labels)
    listed = [f"{n} ({counts[i]:,})" for i, n in enumerate(data.class_names[:MAX_LISTED_CLASSES])]
    num_unlisted = len(data.class_names) - MAX_LISTED_CLASSES
    return (
        f"{len(data):,} texts in {len(data.class_names)} classes: {', '.join(listed)}"
        f"{f' and {num_unlisted} more' if num_unlisted > 0 else ''}"
    )


class ClassificationBatch(TypedDict):
    """Input of one training or evaluation step."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]  # tokens per row without padding
    labels: Int32[np.ndarray, " B"]
    loss_weights: Float32[np.ndarray, " B"]  # 0 for padding rows


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationBatches(BucketedBatches):
    """Length-bucketed batches of tokenized texts with labels."""

    token_ids: Sequence[Sequence[int]]  # per text
    labels: Sequence[int]

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.token_ids]

    def make_batch(self, length: int, indices: Sequence[int] | np.ndarray) -> ClassificationBatch:
        """Returns the texts at these indices, padded to the length and batch size."""
        batch = ClassificationBatch(
            tokens=np.full((self.rows, length), self.pad_id, np.int32),
            lengths=np.ones(self.rows, np.int32),
            labels=np.zeros(self.rows, np.int32),
            loss_weights=np.zeros(self.rows, np.float32),
        )
        for b, n in enumerate(indices):
            ids = self.token_ids[n]
            batch["tokens"][b, : len(ids)] = ids
            batch["lengths"][b], batch["labels"][b] = len(ids), self.labels[n]
            batch["loss_weights"][b] = 1
        return batch
