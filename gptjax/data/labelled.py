"""Labelled texts, for classification, out of tables and folders.

A table is a .csv, .tsv, .jsonl or .json file (also .gz), whose columns of text and
labels are guessed where they are not given; what was guessed is told. A folder holds
one folder per label, named by it, with a .txt file per text.

Comma-separated files are read strictly, tab-separated ones as pandas reads them by
default: a field that starts with a quote mark goes on to the next one, over the ends
of lines too.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from gptjax.config import suggestion
from gptjax.data import named
from gptjax.data.python_lines import PYTHON_LINES, python_lines
from gptjax.data.rows import ROWS, Row, field_lists, opened
from gptjax.data.text import read_text, row_text, suffix
from gptjax.errors import DataError

SMS = named.NAMED["sms-spam"].file  # tab-separated, with no ending and no header
TEXTS = ("text", "sentence", "content", "message", "review", "document", "sms")
TEXTS += ("comment", "tweet", "body", "question", "headline")
LABELS = ("label", "class", "target", "category", "sentiment", "labels", "intent")
LABELS += ("topic", "polarity", "rating", "stars")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = {
    ".csv": "comma-separated",
    ".tsv": "tab-separated",
    ".jsonl": "JSON lines",
    ".json": "JSON list",
}
FIELD_FIX = {
    ",": 'Quote text that holds commas: "a, b".',
    "\t": "A tab ends a field: write a space for one inside a text.",
}
LABEL_CHARACTERS = 50  # a column with longer values is not guessed to be labels
SHOWN = 8  # classes that are listed by name


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts and their classes."""

    texts: list[str]
    labels: list[int]  # of each text, an index of `names`
    names: tuple[str, ...]  # of the classes; sorted, numbers by their value
    places: list[str]  # "file:line" of each text

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self.texts)


class Table(NamedTuple):
    """Rows of a file, before it is settled what their columns mean."""

    path: Path
    kind: str  # for people
    columns: list[str]
    rows: list[Row]


def select(data: Labelled, indices: Iterable[SupportsIndex]) -> Labelled:
    """The rows with these indices, in this order; the classes stay the same."""
    chosen = list(indices)
    return dataclasses.replace(
        data,
        texts=[data.texts[i] for i in chosen],
        labels=[data.labels[i] for i in chosen],
        places=[data.places[i] for i in chosen],
    )


def read_labelled(
    path: Path | str, text: str = "", label: str = ""
) -> tuple[Labelled, str]:
    """(the labelled texts, a line that says what was taken for what).

    Args:
        path: a named data set, a table, or a folder with one folder per label.
        text: column of the text; "" = guess. Columns without names are counted from 1.
        label: column of the label; "" = guess.

    Raises:
        DataError: there are no such rows, or one of them cannot be used.
    """
    if path == PYTHON_LINES:
        data = label_rows(python_lines(), PYTHON_LINES)
        return data, f"lines of Python's own library; {summary(data)}."
    place = find(str(path))
    if place.is_dir():
        if text or label:
            raise DataError(
                f"{place} is a folder, which has no columns. Leave data.text and "
                "data.label empty, or give a file."
            )
        data = label_rows(folder_rows(place), str(place))
        return data, (
            f"{place}: .txt files in folders that are named by their labels; "
            f"{summary(data)}."
        )
    table = read_table(place, {text, label} - {""})
    text, label = choose_columns(table, text, label)
    data = label_rows(table_rows(table, text, label), f"{place}, column {label!r}")
    return data, (
        f"{place}: {table.kind}; text in column {text!r}, label in column {label!r}; "
        f"{summary(data)}{joined_lines(table, text)}. "
        "Others: --data.text NAME --data.label NAME."
    )


def find(path: str) -> Path:
    """The file or folder that the user's argument stands for."""
    if path == "sms-spam":
        return named.find(path)
    if path in (named.PYTHON_HELP, *named.NAMED):
        raise DataError(
            f"the data set {path} has no labels. Take sms-spam, or give a file."
        )
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(
            f"nothing is at {path}. Give a {', '.join(KINDS)} file (also .gz), a "
            "folder with one folder of .txt files per label, or the data set sms-spam."
        )
    if not place.is_dir() and ending(place) not in KINDS:
        raise DataError(
            f"cannot tell what {path} holds from its name. Rename it to end in one of "
            f"{', '.join(KINDS)} (also .gz)."
        )
    return place


def ending(path: Path) -> str:
    """The ending that says what the file holds."""
    return ".tsv" if path.name.removesuffix(".gz") == SMS else suffix(path)


def read_table(path: Path, given: set[str]) -> Table:
    """All rows of a file; `given` are the columns that the user names."""
    kind = ending(path)
    with opened(path) as (file, _):
        if kind in DELIMITERS:
            mark = DELIMITERS[kind]
            lists = [
                (line, fields)
                for line, fields in field_lists(file, path, mark, strict=mark == ",")
                if fields  # not a blank line
            ]
            table = fields_table(path, lists, given)
        else:
            rows = list(ROWS[kind.removeprefix(".")](file, path))
            table = objects_table(path, rows)
    if not table.rows:
        raise DataError(f"{path} has no rows. Give a file with labelled texts.")
    return table


def objects_table(path: Path, rows: list[Row]) -> Table:
    """The table of a JSON file, each of whose rows must be an object."""
    for line, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{line}: {row!r:.40} has no columns. Write each row as "
                '{"text": "...", "label": "..."}.'
            )
    return Table(path, KINDS[ending(path)], list(rows[0][1]) if rows else [], rows)


def fields_table(
    path: Path, lists: list[tuple[int, list[str]]], given: set[str]
) -> Table:
    """The table of a file whose first row may be a header."""
    kind, mark = KINDS[ending(path)], DELIMITERS[ending(path)]
    first = [name.strip() for name in lists[0][1]] if lists else []
    for line, fields in lists:
        if len(fields) != len(first):
            raise DataError(
                f"{path}:{line}: {len(fields)} fields, but {len(first)} in the first "
                f"row. {FIELD_FIX[mark]}"
            )

    def table(kind: str, names: list[str], skip: int = 0) -> Table:
        rows = [(n, dict(zip(names, row, strict=True))) for n, row in lists[skip:]]
        return Table(path, kind, names, rows)

    if not suffix(path) and len(first) == 2:  # the SMS collection
        return table(f"{kind}, no header", ["label", "text"])
    counted = table(f"{kind}, no header", [str(n + 1) for n in range(len(first))])
    if not lists or not has_header(counted, first, given):
        return counted
    if len(set(first)) < len(first):
        raise DataError(f"{path}:1: a column name appears twice: {first}.")
    return table(f"{kind}, with a header", first, skip=1)


def has_header(table: Table, first: list[str], given: set[str]) -> bool:
    """Whether the first row, which is still one of the table's, names the columns.

    It does not where the user counts the columns, or where it has a label that other
    rows have too.
    """
    if given & set(first) or {name.lower() for name in first} & {*TEXTS, *LABELS}:
        return True
    if given and given <= set(table.columns):
        return False
    column = label_like(table)
    others = [row[column] for _, row in table.rows[1:]] if column else []
    return not column or table.rows[0][1][column] not in others


def label_like(table: Table) -> str:
    """Of two columns, the one that looks like labels beside texts; "" is neither."""
    if len(table.columns) != 2:
        return ""
    for one, other in (table.columns, table.columns[::-1]):
        labels = [str(row.get(one, "")) for _, row in table.rows]
        texts = [str(row.get(other, "")) for _, row in table.rows]
        if (
            2 * len(set(labels)) <= len(labels)
            and len(set(labels)) < len(set(texts))
            and sum(map(len, labels)) < sum(map(len, texts))
            and max(map(len, labels)) <= LABEL_CHARACTERS
        ):
            return one
    return ""


def choose_columns(table: Table, text: str, label: str) -> tuple[str, str]:
    """The columns of the text and of the label, guessed where they are ""."""
    columns = table.columns
    place = f"{table.path}:{table.rows[0][0]}"
    for option, name in (("text", text), ("label", label)):
        if name and name not in columns:
            raise unknown_column(name, option, columns, place)
    if text and text == label:
        raise DataError(
            f"data.text and data.label are both {text!r}. Name two columns of "
            f"{', '.join(columns)}."
        )
    rest = [name for name in columns if name not in (text, label)]
    text = text or known_column(rest, TEXTS)
    label = label or known_column(rest, LABELS)
    rest = [name for name in columns if name not in (text, label)]
    if len(columns) == 2 and not text:
        label = label or label_like(table)
        text = "".join(set(columns) - {label}) if label else ""
    elif len(columns) == 2 and not label:
        values = [str(row.get(rest[0], "")) for _, row in table.rows]
        label = rest[0] if len(set(values)) < len(values) else ""
    if not text or not label:
        count = ending(table.path) in DELIMITERS
        raise DataError(
            f"{place}: cannot tell which column holds the text and which the label; "
            f"columns: {', '.join(columns) or 'none'}. Name them: --data.text NAME "
            "--data.label NAME"
            + (" (or count from 1 where the first row is no header)." * count or ".")
        )
    return text, label


def known_column(columns: list[str], names: Sequence[str]) -> str:
    """The one column with a known name; the first of `names` is known best."""
    for known in (names[:1], names):
        found = [name for name in columns if name.strip().lower() in known]
        if len(found) == 1:
            return found[0]
    return ""


def unknown_column(
    name: str, option: str, columns: Iterable[str], place: str
) -> DataError:
    """The error that a column is not there."""
    columns = list(columns)
    return DataError(
        f"{place}: no column {name!r}.{suggestion(name, columns)} Columns: "
        f"{', '.join(columns) or 'none'}. Choose with --data.{option} NAME."
    )


def table_rows(table: Table, text: str, label: str) -> Iterator[tuple[str, str, str]]:
    """(text, label, place) of each row."""
    for line, row in table.rows:
        place = f"{table.path}:{line}"
        for option, name in (("text", text), ("label", label)):
            if name not in row:
                raise unknown_column(name, option, row, place)
        yield row_text(row, text, place), row_label(row, label, place), place


def row_label(row: dict[str, Any], column: str, place: str) -> str:
    """The label of one row, as a string without spaces around it."""
    value = row[column]
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, dict | list):
        raise DataError(
            f"{place}: the label in column {column!r} is {value!r:.40}, not a string "
            "or a number. Give each text one label."
        )
    label = "" if value is None else row_text(row, column, place).strip()
    if not label:
        raise DataError(
            f"{place}: no label in column {column!r}. Give the row one, or remove it."
        )
    return label


def folder_rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(text, label, place) of each .txt file in a folder that is named by a label."""

    def shown(place: Path) -> list[Path]:
        return [path for path in sorted(place.iterdir()) if path.name[0] != "."]

    def folders(place: Path) -> list[Path]:
        return [path for path in shown(place) if path.is_dir()]

    def texts(place: Path) -> list[Path]:
        return [p for p in shown(place) if suffix(p) == ".txt" and p.is_file()]

    for inner in folders(folder):
        if any(texts(deeper) for deeper in folders(inner)):
            raise DataError(
                f"{folder} holds {inner.name}, which holds folders of texts itself. "
                f"Give the folder whose folders are the labels, such as {inner}."
            )
    files = [(file, inner.name) for inner in folders(folder) for file in texts(inner)]
    if not files:
        raise DataError(
            f"{folder} has no folders of .txt files. Put each text into a folder that "
            f"is named by its label, such as {folder / 'spam' / '1.txt'}, or give a "
            "file."
        )
    for file, label in files:
        yield read_text(file), label, f"{file}:1"


def label_rows(rows: Iterable[tuple[str, str, str]], where: str) -> Labelled:
    """The rows (text, label, place) with labels as numbers.

    Args:
        rows: in the order they keep.
        where: the labels are from, for errors.
    """
    texts, labels, places = [], [], []
    for text, label, place in rows:
        if not text.strip():
            raise DataError(f"{place}: the text is empty. Remove the row or fill it.")
        texts.append(text)
        labels.append(label)
        places.append(place)
    names = sorted(set(labels), key=name_order)
    if len(names) < 2:
        raise DataError(
            f"{where}: the only label is {names[0]!r}, but a classifier needs two "
            "classes. Add the others, or choose the column with --data.label NAME."
        )
    ids = {name: number for number, name in enumerate(names)}
    return Labelled(texts, [ids[label] for label in labels], tuple(names), places)


def name_order(name: str) -> tuple[int, float, str]:
    """What class names are sorted by: numbers first, by their value."""
    if re.fullmatch(r"-?\d{1,300}(\.\d+)?", name, re.ASCII):
        return 0, float(name), name
    return 1, 0.0, name


def summary(data: Labelled) -> str:
    """How many texts each class has."""
    counts = Counter(data.labels)
    shown = [f"{n} ({counts[i]:,})" for i, n in enumerate(data.names[:SHOWN])]
    more = len(data.names) - SHOWN
    return (
        f"{len(data):,} texts in {len(data.names)} classes: {', '.join(shown)}"
        f"{f' and {more} more' if more > 0 else ''}"
    )


def joined_lines(table: Table, text: str) -> str:
    """Which texts of a tab-separated file hold line ends, as few are meant to."""
    lines = [line for line, row in table.rows if "\n" in row[text]]
    if not lines or ending(table.path) != ".tsv":
        return ""
    return f"; {len(lines):,} with line ends in quote marks, first at line {lines[0]}"
