"""Documents out of text, JSON and CSV files, in pieces of bounded size.

A .txt or .md file is one document, whatever blank lines or `<|endoftext|>` it holds; a
row of .jsonl, .json and .csv is one document; empty documents do not exist. Any of
them may be compressed (.gz). Text is taken as it is written: strict UTF-8, line ends
and spaces included; only a byte order mark is dropped, and NUL is refused.

A document longer than `PIECE` characters arrives in pieces, so that one larger than
memory can be read. The cut is in front of a space or line end that follows another
character. No GPT-2 token spans such a place, so that the pieces' tokens are the
document's. Text that has no such place in `PIECE` characters is cut all the same.
"""

import dataclasses
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data import named
from gptjax.data.rows import ROWS, opened, read_blocks, strict_text
from gptjax.errors import DataError

PIECE = 1 << 18  # characters
KINDS = {".txt": "text", ".md": "text"} | {f".{kind}": kind for kind in ROWS}
COLUMNS = ("text", "content", "document")  # what a column of text is mostly called
BOUNDARY = re.compile(r"(?s).*(?<=\S)[ \n]")  # the last one, as .* is greedy


class Piece(NamedTuple):
    """Some characters of a document, never none."""

    text: str
    last: bool  # of its document
    offset: int  # bytes of the file that have been read by now


@dataclasses.dataclass(frozen=True)
class Source:
    """One file and how to read it."""

    path: Path
    kind: str  # a key of ROWS, "text" or "python-help"
    column: str  # of the rows' text; "" where rows are strings or there are no rows


def find_sources(paths: Sequence[str | Path], column: str = "") -> list[Source]:
    """The files that named sets, files, folders and globs stand for, each once.

    A folder stands for all its files of a known kind, also in folders below, in the
    order of their names; hidden ones are left out.

    Args:
        paths: what to read; a name that is also a data set's is the data set.
        column: of JSON and CSV rows that holds the text; "" guesses it from the
            first row.

    Raises:
        DataError: nothing is there, or it is of no known kind.
    """
    files: dict[Path, Path] = {}  # resolved: as given
    for path in paths:
        files |= {file.resolve(): file for file in expand(str(path))}
    sources = []
    for path in files.values():
        kind = kind_of(path)
        source = Source(path, kind, column)
        if kind in ROWS and not column:
            with opened(path) as (file, _):
                line, row = next(ROWS[kind](file, path), (0, ""))
            source = Source(path, kind, guess_column(row, f"{path}:{line}"))
        sources.append(source)
    return sources


def expand(path: str) -> list[Path]:
    """The files behind one argument of the user."""
    if path == named.PYTHON_HELP:
        return [Path(path)]
    if path in named.NAMED:
        return [named.find(path)]
    place = Path(path).expanduser()
    if place.is_dir():
        below = (file.relative_to(place) for file in sorted(place.rglob("*")))
        found = [
            place / file
            for file in below
            if not any(part.startswith(".") for part in file.parts)
            and suffix(file) in KINDS
            and (place / file).is_file()
        ]
    elif place.is_file():
        found = [place]
    else:
        matches = sorted(glob.glob(str(place), recursive=True))
        found = [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        raise DataError(
            f"no text is found at {path}. Give a file, a folder or a glob of "
            f"{', '.join(KINDS)} files (also .gz), or a data set: "
            f"{', '.join([named.PYTHON_HELP, *named.NAMED])}."
        )
    return found


def suffix(path: Path) -> str:
    """The ending that says what the file holds, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def kind_of(path: Path) -> str:
    """How the file is read."""
    if str(path) == named.PYTHON_HELP:
        return named.PYTHON_HELP
    if suffix(path) not in KINDS:
        raise DataError(
            f"cannot tell what {path} holds from its name. Rename it to end in one of "
            f"{', '.join(KINDS)} (also .gz)."
        )
    return KINDS[suffix(path)]


def guess_column(row: Any, place: str) -> str:
    """The column that holds the text, told from the first row."""
    if not isinstance(row, dict):
        return ""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    for known in COLUMNS:
        if known in strings:
            return known
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"{place}: cannot tell which column holds the text; columns of strings: "
        f"{', '.join(strings) or 'none'}. Name one: --column NAME (data.text)."
    )


def read_pieces(source: Source) -> Iterator[Piece]:
    """The documents of one source, in pieces.

    Raises:
        DataError: the text cannot be used; says the file and the line.
    """
    path = source.path
    if source.kind == named.PYTHON_HELP:
        for text in named.python_help():
            yield from (Piece(*cut, 0) for cut in cut_document([text]))
        return
    with opened(path) as (file, raw):
        if source.kind == "text":
            texts = (text for _, text in strict_text(read_blocks(file), path))
            yield from (Piece(*cut, raw.tell()) for cut in cut_document(texts))
            return
        for line, row in ROWS[source.kind](file, path):
            text = row_text(row, source.column, f"{path}:{line}")
            yield from (Piece(*cut, raw.tell()) for cut in cut_document([text]))


def count_documents(sources: Sequence[Source], most: int) -> int:
    """How many documents there are; stops counting above `most`."""
    count = 0
    for source in sources:
        for piece in read_pieces(source):
            count += piece.last or source.kind == "text"
            if source.kind == "text" or count > most:
                break  # one document, however long
    return count


def cut_document(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last) of the document that the texts are parts of."""
    held = ""
    for text in texts:
        held += text
        while len(held) > PIECE:
            match = BOUNDARY.match(held, 0, PIECE + 1)
            cut = match.end() - 1 if match else PIECE
            yield held[:cut], False
            held = held[cut:]
    if held:
        yield held, True


def row_text(row: Any, column: str, place: str) -> str:
    """The text of one row."""
    if column and (not isinstance(row, dict) or column not in row):
        known = ", ".join(row) if isinstance(row, dict) else "none"
        raise DataError(
            f"{place}: no column {column!r}. Columns: {known}. Choose with "
            "--column NAME."
        )
    text = row[column] if column else row
    if not isinstance(text, str):
        what = f"column {column!r}" if column else "the row"
        raise DataError(f"{place}: {what} is {text!r:.40}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half a surrogate pair, {text[error.start]!r}, which is no "
            "character. Write the character itself."
        ) from error
    if "\0" in text:
        raise DataError(f"{place}: a NUL character, which no text holds. Remove it.")
    return text


def read_text(path: Path) -> str:
    """All text of one .txt or .md file, of any other name too.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    source = Source(path, "text", "")
    return "".join(piece.text for piece in read_pieces(source))
