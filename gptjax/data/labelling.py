"""Labels for each row of a file, which may be larger than memory.

Rows are read strictly, one batch at a time, and written in their order. The new file
gets its name when all of it is there; until then it is NAME.part.
"""

import contextlib
import csv
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

from gptjax.data.labelled import DELIMITERS, FIELD_FIX, LABELS, TEXTS, known_column
from gptjax.data.rows import field_lists, jsonl_rows, opened, read_lines
from gptjax.data.text import row_text, suffix
from gptjax.download import BAR_SECONDS, clear_bar, draw_bar
from gptjax.errors import DataError

READ = (*DELIMITERS, ".jsonl", ".txt")
WRITTEN = (*DELIMITERS, ".jsonl")
ADDED = ("label", "probability")
DIGITS = 6  # of a probability, after the point

Predict = Callable[[list[str]], list[tuple[str, float]]]


class Item(NamedTuple):
    """One row and where it is."""

    place: str  # "file:line"
    row: dict[str, Any]
    share: float  # of the file that has been read by now


def label_file(
    source: Path,
    out: Path,
    predict: Predict,
    *,
    text: str = "",
    batch: int = 256,
    say: Callable[[str], None] = print,
) -> int:
    """Writes the rows of `source` with a label and its probability; returns how many.

    A .csv or .tsv file has its column names in the first row, a .jsonl file one
    object a line, a .txt file one text a line; blank lines are left out. The new
    columns come last. They are called label and probability, or predicted_label and
    predicted_probability where one of these is taken.

    Args:
        source: what to read, .gz too.
        out: what to write, of the kind that its name ends in; must not be there.
        predict: (label, probability) of each of some texts.
        text: the column of the texts; "" = guess.
        batch: texts that `predict` gets at once.
        say: gets each line for the user.

    Raises:
        DataError: a row or the column cannot be used, or a file cannot be read or
            written. Then there is no `out`.
    """
    check_names(source, out)
    items = read_items(source)
    first = next(items, None)
    if first is None:
        raise DataError(f"{source} has no rows. Give a file with one text a row.")
    column = text or guess_text(first)
    if not text:
        say(f"{source}: text in column {column!r}. Another: --text NAME.")
    added = added_columns(first)
    items = itertools.chain([first], items)
    count, shown = 0, time.monotonic()
    try:
        with new_file(out) as file:
            put = make_put(file, out, [*first.row, *added])
            while some := list(itertools.islice(items, batch)):
                found = predict([text_of(item, column) for item in some])
                for item, (label, probability) in zip(some, found, strict=True):
                    new = (label, round(float(probability), DIGITS))
                    put(item, dict(zip(added, new, strict=True)))
                count += len(some)
                if time.monotonic() - shown > BAR_SECONDS and sys.stderr.isatty():
                    shown = time.monotonic()
                    draw_bar(f"labelling {source.name}", some[-1].share)
    finally:
        clear_bar()
    say(f"wrote {out}: {count:,} rows, new columns {' and '.join(added)}")
    return count


def check_names(source: Path, out: Path) -> None:
    """Refuses files whose names end in nothing known, and an `out` that is there."""
    if suffix(source) not in READ:
        raise DataError(
            f"cannot tell what {source} holds from its name. Rename it to end in one "
            f"of {', '.join(READ)} (also .gz)."
        )
    # Objects of JSON may differ in their names and nest: no table holds them.
    kinds = (".jsonl",) if suffix(source) == ".jsonl" else WRITTEN
    if out.suffix.lower() not in kinds:
        raise DataError(
            f"labels of {source.name} cannot go into {out}. Give a name that ends in "
            f"{' or '.join(kinds)}."
        )
    if out.exists():
        raise DataError(f"{out} is there already. Remove it, or give another name.")


def read_items(path: Path) -> Iterator[Item]:
    """The rows of a file."""
    with opened(path) as (file, raw):
        size = max(1, path.stat().st_size)
        if suffix(path) == ".jsonl":
            rows = jsonl_rows(file, path)
        elif suffix(path) == ".txt":
            lines = ((n, line.rstrip("\r\n")) for n, line in read_lines(file, path))
            rows = ((n, {"text": line}) for n, line in lines if line.strip())
        else:
            mark = DELIMITERS[suffix(path)]
            lists = field_lists(file, path, mark, strict=mark == ",")
            rows = table_rows(lists, path, mark)
        for line, row in rows:
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{line}: {row!r:.40} has no columns. Write each row as "
                    '{"text": "..."}.'
                )
            yield Item(f"{path}:{line}", row, raw.tell() / size)


def table_rows(
    lists: Iterator[tuple[int, list[str]]], path: Path, mark: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) under the names of the first row."""
    full = ((line, fields) for line, fields in lists if fields)
    line, names = next(full, (1, []))
    names = [name.strip() for name in names]
    if len(set(names)) < len(names):
        raise DataError(f"{path}:{line}: a column name appears twice: {names}.")
    for line, fields in full:
        if len(fields) != len(names):
            raise DataError(
                f"{path}:{line}: {len(fields)} fields under {len(names)} column "
                f"names. {FIELD_FIX[mark]}"
            )
        yield line, dict(zip(names, fields, strict=True))


def guess_text(item: Item) -> str:
    """The column of the texts: one with a known name, or the only one of strings."""
    strings = [name for name, value in item.row.items() if isinstance(value, str)]
    known = known_column(strings, TEXTS)
    others = [name for name in strings if name.strip().lower() not in LABELS]
    if not known and len(others) != 1:
        raise DataError(
            f"{item.place}: cannot tell which column holds the text; columns of "
            f"strings: {', '.join(strings) or 'none'}. Name one: --text NAME."
        )
    return known or others[0]


def text_of(item: Item, column: str) -> str:
    """The text of a row, which is not empty."""
    if column not in item.row:
        raise DataError(
            f"{item.place}: no column {column!r}. Columns: "
            f"{', '.join(item.row) or 'none'}. Choose with --text NAME."
        )
    text = row_text(item.row, column, item.place)
    if not text.strip():
        raise DataError(f"{item.place}: the text is empty. Remove the row or fill it.")
    return text


def added_columns(item: Item) -> tuple[str, ...]:
    """The names of the label and of the probability, none of which the row has."""
    added = ADDED
    if set(added) & set(item.row):
        added = tuple(f"predicted_{name}" for name in ADDED)
    refuse_taken(item, added)
    return added


def refuse_taken(item: Item, added: tuple[str, ...] | dict[str, Any]) -> None:
    """Raises a DataError where the row has a column that would be added."""
    for name in added:
        if name in item.row:
            raise DataError(
                f"{item.place}: the column {name!r} is there already and would be "
                "lost. Rename or remove it."
            )


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[TextIO]:
    """A file that has its name once the block ends well, and is gone if it does not."""
    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Only strings of JSON may hold half a surrogate pair, which has no UTF-8; its
        # backslash escape is the one of JSON.
        with part.open(
            "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as f:
            try:
                yield f
                f.flush()
                os.fsync(f.fileno())
            except BaseException:
                part.unlink()
                raise
        os.replace(part, out)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error}. Check that its folder can be written and "
            "has room."
        ) from error


def make_put(
    file: TextIO, out: Path, columns: list[str]
) -> Callable[[Item, dict[str, Any]], None]:
    """A function that writes a row and what is added to it."""
    if out.suffix.lower() == ".jsonl":

        def put_object(item: Item, added: dict[str, Any]) -> None:
            refuse_taken(item, added)
            row = item.row | added
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            except ValueError as error:  # 1e999 was read as infinite
                raise DataError(
                    f"{item.place}: a number that JSON does not have. Write another."
                ) from error
            file.write(line + "\n")

        return put_object

    # Python before 3.13 quotes a lone \r only if it is a part of the line's end.
    lines = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
    mark = DELIMITERS[out.suffix.lower()]
    writer = csv.writer(lines, delimiter=mark, lineterminator="\r\n")
    writer.writerow(columns)

    def put_fields(item: Item, added: dict[str, Any]) -> None:
        writer.writerow([*item.row.values(), *added.values()])

    return put_fields
