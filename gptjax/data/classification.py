"""Labeled texts for classification, from tables and folders, and their batches.

The text and label columns of a table are guessed by their names unless given; the
returned description states the choice. A folder contains one folder per label, with one
.txt file per text.
"""

import dataclasses
import functools
import itertools
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.bucketing import BucketedBatches
from gptjax.data.datasets import PYTHON_LINES, python_lines
from gptjax.data.packed_rows import decode_text, encode_text, pack_columns, take_rows
from gptjax.data.readers import (
    DELIMITERS,
    EXCLUDING_VALUES,
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    LocatedRow,
    check_object,
    column_names,
    describe_unread,
    find_column,
    find_table,
    get_text,
    name_columns,
    read_csv_records,
    read_rows,
    read_text_file,
    require_text,
    suffix_without_gz,
    table_format,
    table_suffix,
    unknown_column_error,
    unread_columns,
    visible_files,
)
from gptjax.data.token_files import token_dtype
from gptjax.errors import DataError
from gptjax.fileio.paths import user_path
from gptjax.runtime.timing import log_progress
from gptjax.tokenizer.tokenizer import Tokenizer

MAX_LISTED_CLASSES = 8  # classes listed by name in a summary
MAX_LABEL_CHARS = 200  # class names are printed in full
# Options of `gptjax train` that choose the columns.
TRAIN_OPTIONS = ("--data.text_column NAME", "--data.label_column NAME")


@dataclasses.dataclass(frozen=True)
class LabeledTexts:
    """Texts with class labels."""

    texts: Sequence[str]
    labels: list[int]  # indices into `class_names`
    class_names: tuple[str, ...]  # sorted, numbers by value
    locations: Sequence[str]  # of each text, such as "file:line"
    columns: tuple[str, ...] = ()  # names of the text and the label column of a table

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)


def take(data: LabeledTexts, indices: Iterable[SupportsIndex]) -> LabeledTexts:
    """Returns the rows at `indices`, in this order, with the same classes."""
    chosen = np.fromiter(map(int, indices), np.int64)
    return dataclasses.replace(
        data,
        texts=take_rows(data.texts, chosen),
        labels=[data.labels[i] for i in chosen],
        locations=take_rows(data.locations, chosen),
    )


def read_labeled_texts(
    path: Path | str,
    text_column: str = "",
    label_column: str = "",
    *,
    class_names: Sequence[str] = (),
    usual_columns: Sequence[str] = (),
    options: tuple[str, str] = TRAIN_OPTIONS,
) -> tuple[LabeledTexts, str]:
    """Reads labeled texts; returns them with a one-line description.

    `path` is a built-in data set, a table, or a folder with one folder per label. ""
    takes the column of `usual_columns` that the table has, or guesses; columns without
    a name are numbered from 1. `class_names` are those of a model, of which any may
    occur. `options` choose the columns, for messages.
    """
    if path == PYTHON_LINES:
        data = encode_labels(python_lines(), "", class_names)
        return data, f"lines of Python's standard library; {summarize_classes(data)}."
    source = user_path(path)
    if source.is_dir():
        if text_column or label_column:
            raise DataError(
                f"{source} is a folder and has no columns. Omit {' and '.join(options)}, or pass "
                "a file."
            )
        data = encode_labels(folder_examples(source), str(source), class_names)
        return data, f"{source}: one folder of .txt files per label; {summarize_classes(data)}."
    folder = ", a folder with one folder of .txt files per label,"
    source = find_table(str(path), ("sms-spam",), "labels", folder)
    named = {text_column, label_column} - {""} or set(usual_columns)
    file_format, table = read_table(source, named)
    rows = log_progress(table, None, "reading", "rows")
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} has no rows. Pass a file with labeled texts.")
    chosen = (text_column, label_column)
    columns = choose_columns(list(first[1]), chosen, usual_columns, first[0], options)
    text_column, label_column = columns
    unread: Counter[str] = Counter()
    excluding = {} if class_names else EXCLUDING_VALUES

    def examples() -> Iterator[tuple[str, str, str]]:
        for location, row in itertools.chain([first], rows):
            text = get_text(row, text_column, location, options[0])
            yield text, get_label(row, label_column, location, options[1]), location
            unread.update(unread_columns(row, columns, location, excluding))

    data = encode_labels(examples(), str(source), class_names, label_column, options[1])
    return dataclasses.replace(data, columns=columns), (
        f"{source}: {file_format}; text in column {text_column!r}, label in column "
        f"{label_column!r}{describe_unread(unread)}; {summarize_classes(data)}. "
        f"Override with {' '.join(options)}."
    )


def read_table(path: Path, named_columns: set[str]) -> tuple[str, Iterator[LocatedRow]]:
    """Returns the format of a table and its rows, which are dicts.

    The first row of a CSV or TSV file is its header, unless `named_columns`, those
    named by the user, are numbers.
    """
    file_format = table_format(path)
    if table_suffix(path) not in DELIMITERS:
        advice = 'Write each row as {"text": "...", "label": "..."}.'
        return file_format, ((at, check_object(row, at, advice)) for at, row in read_rows(path))
    records = read_csv_records(path)
    first = next(records, ("", []))
    names = column_names(first[1])
    numbers = [str(n) for n in range(1, len(names) + 1)]
    known = {name.lower() for name in names} & {*TEXT_COLUMNS, *LABEL_COLUMNS}
    is_sms_spam = table_suffix(path) != suffix_without_gz(path)
    if is_sms_spam and len(names) == 2:
        header = [("", ["label", "text"])]
    elif named_columns and not known and named_columns <= set(numbers) - set(names):
        header = [("", numbers)]
    else:
        return f"{file_format}, with a header", name_columns(itertools.chain([first], records))
    return f"{file_format}, no header", name_columns(itertools.chain(header, [first], records))


def choose_columns(
    columns: list[str],
    chosen: Sequence[str],
    usual: Sequence[str],
    location: str,
    options: Sequence[str],
) -> tuple[str, str]:
    """Returns the text and the label column: chosen, usual or guessed."""
    for name, option in zip(chosen, options, strict=True):
        if name and name not in columns:
            raise unknown_column_error(name, columns, location, option)
    defaults = [name * (name in columns and name not in chosen) for name in usual or ("", "")]
    text_column, label_column = (
        name or other for name, other in zip(chosen, defaults, strict=True)
    )
    remaining = [name for name in columns if name not in (text_column, label_column)]
    text_column = text_column or find_column(remaining, TEXT_COLUMNS)
    label_column = label_column or find_column(remaining, LABEL_COLUMNS)
    named = [name for name in columns if not name.isdecimal()] or columns
    if len(named) == 2 and (known := text_column or label_column) in named:
        (other,) = set(named) - {known}
        text_column, label_column = text_column or other, label_column or other
    if not text_column or not label_column or text_column == label_column:
        raise DataError(
            f"{location}: ambiguous text and label columns; columns: "
            f"{', '.join(columns) or 'none'}. Choose with {' '.join(options)} (without a "
            "header, numbers from 1)."
        )
    return text_column, label_column


def get_label(row: dict[str, Any], column: str, location: str, option: str) -> str:
    """Returns the label of a row as a stripped string."""
    value = row.get(column)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(
            f"{location}: {column}={value!r} is no label. Write a string or a number, or remove "
            "the row."
        )
    label = require_text(row, column, location, "a label", option).strip()
    if len(label) > MAX_LABEL_CHARS:
        raise DataError(
            f"{location}: {column}={label!r:.40} has {len(label):,} characters, but a label at "
            f"most {MAX_LABEL_CHARS}. Shorten it, or choose the column with {option}."
        )
    return label


def folder_examples(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (text, label, location) of each .txt file; its folder is the label."""
    texts = [path for path in visible_files(folder, (".txt",)) if path.parent != folder]
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


def encode_labels(
    rows: Iterable[tuple[str, str, str]],
    source: str,
    class_names: Sequence[str] = (),
    column: str = "",
    option: str = TRAIN_OPTIONS[1],
) -> LabeledTexts:
    """Builds `LabeledTexts` of (text, label, location) rows.

    All locations start with `source`. `column` and `option` are for messages.
    """

    def encoded_rows() -> Iterator[tuple[bytes, ...]]:
        for text, label, location in rows:
            if not text.strip():
                raise DataError(f"{location}: the text is empty. Add text, or remove the row.")
            yield tuple(map(encode_text, (text, label, location.removeprefix(source))))

    texts, labels, locations = pack_columns(
        encoded_rows(), decode_text, decode_text, lambda encoded: source + decode_text(encoded)
    )
    names = class_names or sorted(set(labels), key=class_sort_key)
    if len(names) < 2 and not class_names:
        raise DataError(
            f"{source}, column {column!r}: the only label is {names[0]!r}, but a classifier needs "
            f"at least two classes. Add rows of other classes, or choose the column with {option}."
        )
    class_ids = {name: number for number, name in enumerate(names)}
    for n, label in enumerate(labels if class_names else ()):
        if label not in class_ids:
            raise DataError(
                f"{locations[n]}: the label {label!r:.200} is none of the model's: "
                f"{', '.join(names)!s:.200}. Rename it, or train with it."
            )
    return LabeledTexts(texts, [class_ids[x] for x in labels], tuple(names), locations)


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


def encode_truncated(
    tokenizer: Tokenizer, texts: Iterable[str], max_length: int
) -> tuple[Sequence[list[int]], int]:
    """Tokenizes texts and packs their first ids; also counts the truncated texts."""
    dtype, num_truncated = token_dtype(tokenizer.vocab_size), 0
    prefix = np.array(tokenizer.prefix_ids, dtype)

    def encoded_rows() -> Iterator[tuple[bytes]]:
        nonlocal num_truncated
        for text in texts:
            ids = np.concatenate([prefix, tokenizer.encode_array(text)])
            num_truncated += len(ids) > max_length
            yield (ids[:max_length].astype(dtype).tobytes(),)

    (packed,) = pack_columns(encoded_rows(), lambda row: np.frombuffer(row, dtype).tolist())
    return packed, num_truncated


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
    def lengths(self) -> Sequence[int]:
        """Tokens of each text."""
        return array("q", map(len, self.token_ids))

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
