"""Labeled texts for classification, from tables and folders, and their batches.

A table is a .csv, .tsv, .jsonl or .json file, optionally gzipped. The text and label
columns are guessed unless named; the returned description states the choice. A folder
contains one folder per label, with one .txt file per text.

CSV files are parsed strictly, TSV files like pandas does by default: a field that
starts with a quote extends to the closing quote, across line ends too.
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

from gptjax.config import did_you_mean
from gptjax.data import datasets
from gptjax.data.bucketing import BucketSampler
from gptjax.data.builtin import PYTHON_LINES, python_lines
from gptjax.data.readers import READERS, NumberedRow, open_decompressed, read_csv_records
from gptjax.data.text import get_row_text, read_text_file, suffix_without_gz
from gptjax.errors import DataError

# Tab-separated, without a file suffix and a header.
SMS_SPAM_FILE = datasets.DATASETS["sms-spam"].file_name
TEXT_COLUMNS = ("text", "sentence", "content", "message", "review", "document", "sms")
TEXT_COLUMNS += ("comment", "tweet", "body", "question", "headline")
LABEL_COLUMNS = ("label", "class", "target", "category", "sentiment", "labels")
LABEL_COLUMNS += ("intent", "topic", "polarity", "rating", "stars")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_FORMATS = {
    ".csv": "comma-separated",
    ".tsv": "tab-separated",
    ".jsonl": "JSON lines",
    ".json": "JSON list",
}
FIELD_COUNT_ADVICE = {
    ",": 'Quote text that contains commas: "a, b".',
    "\t": "Tabs separate fields: replace tabs inside a text by spaces.",
}
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

    Raises:
        DataError: the path, a column or a row is invalid.
    """
    if path == PYTHON_LINES:
        data = encode_labels(python_lines(), PYTHON_LINES)
        return data, f"lines of Python's standard library; {summarize_classes(data)}."
    source = resolve_labeled_path(str(path))
    if source.is_dir():
        if text_column or label_column:
            raise DataError(
                f"{source} is a folder and has no columns. Leave data.text_column and "
                "data.label_column empty, or pass a file."
            )
        data = encode_labels(folder_examples(source), str(source))
        summary = summarize_classes(data)
        return data, f"{source}: .txt files in one folder per label; {summary}."
    table = read_raw_table(source, {text_column, label_column} - {""})
    text_column, label_column = choose_columns(table, text_column, label_column)
    data = encode_labels(
        table_examples(table, text_column, label_column), f"{source}, column {label_column!r}"
    )
    multiline_note = describe_multiline_texts(table, text_column)
    return data, (
        f"{source}: {table.format}; text in column {text_column!r}, label in column "
        f"{label_column!r}; {summarize_classes(data)}{multiline_note}. Override with "
        "--data.text_column NAME --data.label_column NAME."
    )


def resolve_labeled_path(path: str) -> Path:
    """Returns the file or folder of a data set name or a path."""
    if path == "sms-spam":
        return datasets.fetch_dataset(path)
    if path in (datasets.PYTHON_HELP, *datasets.DATASETS):
        raise DataError(f"the data set {path} has no labels. Use sms-spam or a file.")
    source = Path(path).expanduser()
    if not source.exists():
        raise DataError(
            f"{path} does not exist. Pass a {', '.join(TABLE_FORMATS)} file (also "
            ".gz), a folder with one folder of .txt files per label, or the data set "
            "sms-spam."
        )
    if not source.is_dir() and file_suffix(source) not in TABLE_FORMATS:
        raise DataError(
            f"{path}: unsupported file suffix. Supported: {', '.join(TABLE_FORMATS)} (also .gz)."
        )
    return source


def file_suffix(path: Path) -> str:
    """Returns the suffix that determines the file format."""
    is_sms_spam = path.name.removesuffix(".gz") == SMS_SPAM_FILE
    return ".tsv" if is_sms_spam else suffix_without_gz(path)


def read_raw_table(path: Path, named_columns: set[str]) -> RawTable:
    """Reads all rows of a file.

    Args:
        path: of a table.
        named_columns: columns chosen by the user, which help to detect a header.
    """
    file_type = file_suffix(path)
    with open_decompressed(path) as (file, _):
        if file_type in DELIMITERS:
            delimiter = DELIMITERS[file_type]
            records = [
                (line, fields)
                for line, fields in read_csv_records(file, path, delimiter, strict=delimiter == ",")
                if fields  # not a blank line
            ]
            table = table_from_csv(path, records, named_columns)
        else:
            rows = list(READERS[file_type.removeprefix(".")](file, path))
            table = table_from_json(path, rows)
    if not table.rows:
        raise DataError(f"{path} has no rows. Pass a file with labeled texts.")
    return table


def table_from_json(path: Path, rows: list[NumberedRow]) -> RawTable:
    """Returns the table of a JSON file of objects."""
    for line, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{line}: {row!r:.40} has no columns. Write each row as "
                '{"text": "...", "label": "..."}.'
            )
    return RawTable(path, TABLE_FORMATS[file_suffix(path)], list(rows[0][1]) if rows else [], rows)


def table_from_csv(
    path: Path, records: list[tuple[int, list[str]]], named_columns: set[str]
) -> RawTable:
    """Returns the table of a CSV or TSV file; its first row may be a header."""
    kind, delimiter = TABLE_FORMATS[file_suffix(path)], DELIMITERS[file_suffix(path)]
    first_row = [name.strip() for name in records[0][1]] if records else []
    for line, fields in records:
        if len(fields) != len(first_row):
            raise DataError(
                f"{path}:{line}: {len(fields)} fields, but {len(first_row)} in the "
                f"first row. {FIELD_COUNT_ADVICE[delimiter]}"
            )

    def make_table(kind: str, names: list[str], skip: int = 0) -> RawTable:
        rows = [(n, dict(zip(names, row, strict=True))) for n, row in records[skip:]]
        return RawTable(path, kind, names, rows)

    if not suffix_without_gz(path) and len(first_row) == 2:  # the SMS Spam Collection
        return make_table(f"{kind}, no header", ["label", "text"])
    numbered = make_table(f"{kind}, no header", [str(n + 1) for n in range(len(first_row))])
    if not records or not has_header(numbered, first_row, named_columns):
        return numbered
    if len(set(first_row)) < len(first_row):
        raise DataError(f"{path}:1: duplicate column name in {first_row}.")
    return make_table(f"{kind}, with a header", first_row, skip=1)


def has_header(table: RawTable, first_row: list[str], named_columns: set[str]) -> bool:
    """True if the first row of the table contains column names.

    False if the user numbers the columns, or if other rows repeat its label.
    """
    if named_columns & set(first_row) or {name.lower() for name in first_row} & {
        *TEXT_COLUMNS,
        *LABEL_COLUMNS,
    }:
        return True
    if named_columns and named_columns <= set(table.columns):
        return False
    label_column = guess_label_column(table)
    other_labels = [row[label_column] for _, row in table.rows[1:]] if label_column else []
    return not label_column or table.rows[0][1][label_column] not in other_labels


def guess_label_column(table: RawTable) -> str:
    """Returns the one of two columns that looks like labels, or ""."""
    if len(table.columns) != 2:
        return ""
    for candidate, other in (table.columns, table.columns[::-1]):
        labels = [str(row.get(candidate, "")) for _, row in table.rows]
        texts = [str(row.get(other, "")) for _, row in table.rows]
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
            raise unknown_column_error(name, option, columns, location)
    if text_column and text_column == label_column:
        raise DataError(
            f"data.text_column and data.label_column are both {text_column!r}. Choose "
            f"two of {', '.join(columns)}."
        )
    remaining = [name for name in columns if name not in (text_column, label_column)]
    text_column = text_column or known_column(remaining, TEXT_COLUMNS)
    label_column = label_column or known_column(remaining, LABEL_COLUMNS)
    remaining = [name for name in columns if name not in (text_column, label_column)]
    if len(columns) == 2 and not text_column:
        label_column = label_column or guess_label_column(table)
        text_column = "".join(set(columns) - {label_column}) if label_column else ""
    elif len(columns) == 2 and not label_column:
        values = [str(row.get(remaining[0], "")) for _, row in table.rows]
        label_column = remaining[0] if len(set(values)) < len(values) else ""
    if not text_column or not label_column:
        is_delimited = file_suffix(table.path) in DELIMITERS
        raise DataError(
            f"{location}: ambiguous text and label columns; columns: "
            f"{', '.join(columns) or 'none'}. Choose with --data.text_column NAME "
            "--data.label_column NAME"
            + (" (column numbers from 1 if there is no header)." * is_delimited or ".")
        )
    return text_column, label_column


def known_column(columns: list[str], names: Sequence[str]) -> str:
    """Returns the only column with a known name, else ""; `names[0]` is preferred."""
    for accepted in (names[:1], names):
        matches = [name for name in columns if name.strip().lower() in accepted]
        if len(matches) == 1:
            return matches[0]
    return ""


def unknown_column_error(
    name: str, option: str, columns: Iterable[str], location: str
) -> DataError:
    """Returns the error for a missing column."""
    columns = list(columns)
    return DataError(
        f"{location}: no column {name!r}.{did_you_mean(name, columns)} Columns: "
        f"{', '.join(columns) or 'none'}. Choose with --data.{option}_column NAME."
    )


def table_examples(
    table: RawTable, text_column: str, label_column: str
) -> Iterator[tuple[str, str, str]]:
    """Yields (text, label, location) of each row."""
    for line, row in table.rows:
        location = f"{table.path}:{line}"
        for option, name in (("text", text_column), ("label", label_column)):
            if name not in row:
                raise unknown_column_error(name, option, row, location)
        yield (
            get_row_text(row, text_column, location),
            get_label(row, label_column, location),
            location,
        )


def get_label(row: dict[str, Any], column: str, location: str) -> str:
    """Returns the label of a row as a stripped string."""
    value = row[column]
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, dict | list):
        raise DataError(
            f"{location}: the label in column {column!r} is {value!r:.40}, not a "
            "string or a number. Each text needs exactly one label."
        )
    label = "" if value is None else get_row_text(row, column, location).strip()
    if not label:
        raise DataError(f"{location}: no label in column {column!r}. Add one, or remove the row.")
    return label


def folder_examples(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (text, label, location) of each .txt file; its folder is the label."""

    def visible_entries(place: Path) -> list[Path]:
        return [path for path in sorted(place.iterdir()) if path.name[0] != "."]

    def subfolders(place: Path) -> list[Path]:
        return [path for path in visible_entries(place) if path.is_dir()]

    def text_files(place: Path) -> list[Path]:
        return [p for p in visible_entries(place) if suffix_without_gz(p) == ".txt" and p.is_file()]

    for inner in subfolders(folder):
        if any(text_files(deeper) for deeper in subfolders(inner)):
            raise DataError(
                f"{folder} contains {inner.name}, which has subfolders of texts. "
                f"Pass the folder whose subfolders are the labels, such as {inner}."
            )
    files = [(file, inner.name) for inner in subfolders(folder) for file in text_files(inner)]
    if not files:
        raise DataError(
            f"{folder} has no folders of .txt files. Put each text into a folder named "
            f"after its label, such as {folder / 'spam' / '1.txt'}, or pass a file."
        )
    for file, label in files:
        yield read_text_file(file), label, f"{file}:1"


def encode_labels(rows: Iterable[tuple[str, str, str]], source: str) -> LabeledTexts:
    """Builds `LabeledTexts` with integer labels, in the order of the rows.

    Args:
        rows: (text, label, location).
        source: origin of the labels, for error messages.
    """
    texts, labels, locations = [], [], []
    for text, label, location in rows:
        if not text.strip():
            raise DataError(f"{location}: the text is empty. Add text, or remove the row.")
        texts.append(text)
        labels.append(label)
        locations.append(location)
    class_names = sorted(set(labels), key=class_sort_key)
    if len(class_names) < 2:
        raise DataError(
            f"{source}: the only label is {class_names[0]!r}, but a classifier needs "
            "at least two classes. Add rows of other classes, or choose the column "
            "with --data.label_column NAME."
        )
    class_ids = {name: number for number, name in enumerate(class_names)}
    return LabeledTexts(
        texts, [class_ids[label] for label in labels], tuple(class_names), locations
    )


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


def describe_multiline_texts(table: RawTable, text_column: str) -> str:
    """Returns a note on TSV texts with line breaks, which are rarely intended."""
    lines = [line for line, row in table.rows if "\n" in row[text_column]]
    if not lines or file_suffix(table.path) != ".tsv":
        return ""
    return f"; {len(lines):,} with quoted line breaks, first at line {lines[0]}"


class ClassificationBatch(TypedDict):
    """Input of one training or evaluation step."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]  # tokens per row without padding
    labels: Int32[np.ndarray, " B"]
    loss_weights: Float32[np.ndarray, " B"]  # 0 for padding rows


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationBatches:
    """Length-bucketed batches of tokenized texts with labels."""

    token_ids: Sequence[Sequence[int]]  # per text; 1 to max(bucket_lengths) tokens
    labels: Sequence[int]
    rows: int  # batch size B
    bucket_lengths: Sequence[int]  # from `buckets`
    pad_id: int  # padding token
    seed: int = 0

    @functools.cached_property
    def sampler(self) -> BucketSampler:
        """Sampler that assigns rows to batches."""
        return BucketSampler(
            [len(row) for row in self.token_ids], self.rows, self.bucket_lengths, self.seed
        )

    @property
    def batch_shapes(self) -> list[int]:
        """Row lengths [T], one compiled shape each."""
        return self.sampler.batch_shapes

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was used once."""
        return self.sampler.steps_per_epoch

    def batch_at(self, step: int) -> ClassificationBatch:
        """Returns the batch of a training step, counted from 0."""
        return self.make_batch(*self.sampler.batch_rows(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, ClassificationBatch]]:
        """Yields (row indices, batch); every row occurs once."""
        for length, row_indices in self.sampler.epoch_plan(None):
            yield row_indices, self.make_batch(length, row_indices)

    def make_batch(self, length: int, row_indices: np.ndarray) -> ClassificationBatch:
        """Returns the rows at these indices, padded to the length and batch size."""
        token_BT = np.full((self.rows, length), self.pad_id, np.int32)
        length_B = np.ones(self.rows, np.int32)
        class_B = np.zeros(self.rows, np.int32)
        weight_B = np.zeros(self.rows, np.float32)
        for n, row in enumerate(row_indices):
            ids = self.token_ids[row]
            token_BT[n, : len(ids)] = ids
            length_B[n], class_B[n], weight_B[n] = len(ids), self.labels[row], 1
        return ClassificationBatch(
            tokens=token_BT, lengths=length_B, labels=class_B, loss_weights=weight_B
        )
