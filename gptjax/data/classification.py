"""Labeled texts for classification, from tables and folders, and their batches.

The text and label columns of a table are guessed by their names unless given; the
returned description states the choice. A folder contains one folder per label, with one
.txt file per text.
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.bucketing import BucketedBatches
from gptjax.data.datasets import PYTHON_LINES, python_lines
from gptjax.data.readers import (
    DELIMITERS,
    LABEL_COLUMNS,
    TABLE_FORMATS,
    TEXT_COLUMNS,
    LocatedRow,
    check_object,
    find_column,
    find_table,
    get_text,
    name_columns,
    read_csv_records,
    read_rows,
    read_text_file,
    require_text,
    suffix_without_gz,
    table_suffix,
    unknown_column_error,
    visible_files,
)
from gptjax.errors import DataError

MAX_LISTED_CLASSES = 8  # classes listed by name in a summary


@dataclasses.dataclass(frozen=True)
class LabeledTexts:
    """Texts with class labels."""

    texts: list[str]
    labels: list[int]  # indices into `class_names`
    class_names: tuple[str, ...]  # sorted, numbers by value
    locations: list[str]  # of each text, such as "file:line"

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)


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

    `path` is a built-in data set, a table, or a folder with one folder per label. ""
    guesses a column; columns without a header are numbered from 1.
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
    file_format, columns, rows = read_table(source, {text_column, label_column} - {""})
    if not rows:
        raise DataError(f"{source} has no rows. Pass a file with labeled texts.")
    text_column, label_column = choose_columns(columns, text_column, label_column, rows[0][0])
    examples = []
    for location, row in rows:
        text = get_text(row, text_column, location, "--data.text_column NAME")
        examples.append((text, get_label(row, label_column, location), location))
    data = encode_labels(examples, f"{source}, column {label_column!r}")
    return data, (
        f"{source}: {file_format}; text in column {text_column!r}, label in column "
        f"{label_column!r}; {summarize_classes(data)}. "
        "Override with --data.text_column NAME --data.label_column NAME."
    )


def read_table(path: Path, named_columns: set[str]) -> tuple[str, list[str], list[LocatedRow]]:
    """Reads a table; returns its format, its columns and its rows.

    The first row of a CSV or TSV file is its header, unless `named_columns`, those
    named by the user, are numbers.
    """
    suffix = table_suffix(path)
    file_format, delimiter = TABLE_FORMATS[suffix], DELIMITERS.get(suffix)
    if not delimiter:
        advice = 'Write each row as {"text": "...", "label": "..."}.'
        rows = [(where, check_object(row, where, advice)) for where, row in read_rows(path)]
        return file_format, list(rows[0][1]) if rows else [], rows
    records = list(read_csv_records(path, delimiter))
    first_row = [name.strip() for name in records[0][1]] if records else []
    numbers = [str(n) for n in range(1, len(first_row) + 1)]
    known = {name.lower() for name in first_row} & {*TEXT_COLUMNS, *LABEL_COLUMNS}
    if suffix != suffix_without_gz(path) and len(first_row) == 2:  # the SMS Spam Collection
        columns = ["label", "text"]
    elif named_columns and not known and named_columns <= set(numbers) - set(first_row):
        columns = numbers
    else:
        return f"{file_format}, with a header", first_row, list(name_columns(records))
    rows = list(name_columns([("", columns), *records]))
    return f"{file_format}, no header", columns, rows


def choose_columns(
    columns: list[str], text_column: str, label_column: str, location: str
) -> tuple[str, str]:
    """Returns the text and the label column, guessed by their names if ""."""
    for option, name in (("text", text_column), ("label", label_column)):
        if name and name not in columns:
            raise unknown_column_error(name, columns, location, f"--data.{option}_column NAME")
    remaining = [name for name in columns if name not in (text_column, label_column)]
    text_column = text_column or find_column(remaining, TEXT_COLUMNS)
    label_column = label_column or find_column(remaining, LABEL_COLUMNS)
    if len(columns) == 2 and (known := text_column or label_column):
        (other,) = set(columns) - {known}
        text_column, label_column = text_column or other, label_column or other
    if not text_column or not label_column or text_column == label_column:
        raise DataError(
            f"{location}: ambiguous text and label columns; columns: "
            f"{', '.join(columns) or 'none'}. Choose with --data.text_column NAME "
            "--data.label_column NAME (without a header, numbers from 1)."
        )
    return text_column, label_column


def get_label(row: dict[str, Any], column: str, location: str) -> str:
    """Returns the label of a row as a stripped string."""
    value = row.get(column)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(
            f"{location}: {column}={value!r} is no label. Write a string or a number, or remove "
            "the row."
        )
    return require_text(row, column, location, "a label", "--data.label_column NAME").strip()


def folder_examples(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (text, label, location) of each .txt file; its folder is the label."""
    texts = [path for path in visible_files(folder, (".txt",), "*/**/*") if path.parent != folder]
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
    counts, names = Counter(data.labels), data.class_names
    listed = [f"{name} ({counts[n]:,})" for n, name in enumerate(names[:MAX_LISTED_CLASSES])]
    listed += ["..."] * (len(names) > MAX_LISTED_CLASSES)
    return f"{len(data):,} texts in {len(names)} classes: {', '.join(listed)}"


class ClassificationBatch(TypedDict):
    """Input of one training or evaluation step."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]  # tokens per row without padding
    labels: Int32[np.ndarray, " B"]
    loss_weights: Float32[np.ndarray, " B"]  # 0 for padding rows
    # Texts and next-token targets of the whole batch, in each row: a micro-batch has
    # a part of the rows, but weighs next-token losses as the whole batch does.
    batch_totals: Float32[np.ndarray, "B 2"]


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
            batch_totals=np.zeros((self.rows, 2), np.float32),
        )
        for b, n in enumerate(indices):
            ids = self.token_ids[n]
            batch["tokens"][b, : len(ids)] = ids
            batch["lengths"][b], batch["labels"][b] = len(ids), self.labels[n]
            batch["loss_weights"][b] = 1
        batch["batch_totals"][:] = len(indices), (batch["lengths"] - 1).sum()
        return batch
