"""Documents from text, JSON and CSV files, in chunks of bounded size, and their split.

A .txt or .md file is one document, including any blank lines or `<|endoftext|>` in it;
each row of a .jsonl, .json or .csv file is one document; empty documents are dropped.
Any of these files may be compressed (.gz). Text is kept as it is, with line endings
and spaces: strict UTF-8, without a byte order mark; NUL is rejected.

A document longer than `CHUNK_CHARS` characters is split into chunks, so that it need
not fit in memory. Chunks end before a space or newline that follows a non-space
character. No GPT-2 token spans such a position, so the chunks have the same tokens as
the document. Text without such a position is split after `CHUNK_CHARS` characters.

Documents are held out for validation by a hash of their number, so the split needs one
pass and depends on nothing but the seed.
"""

import dataclasses
import glob
import hashlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data import datasets
from gptjax.data.datasets import PYTHON_HELP, read_python_help
from gptjax.data.readers import READERS, decode_utf8, open_decompressed, read_blocks
from gptjax.errors import DataError
from gptjax.fileio.download import (
    PROGRESS_BAR_SECONDS,
    clear_progress_bar,
    draw_progress_bar,
    sha256_of_files,
)

TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT = "train", "validation", "test"
ALL_SPLITS = (TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT)
TEXT_SPLITS = (TRAIN_SPLIT, VALIDATION_SPLIT)  # of pretraining data
CHUNK_CHARS = 1 << 18
FILE_KINDS = {".txt": "text", ".md": "text"} | {f".{kind}": kind for kind in READERS}
TEXT_COLUMN_NAMES = ("text", "content", "document")  # usual names of the text column
CHUNK_BOUNDARY = re.compile(r"(?s).*(?<=\S)[ \n]")  # greedy: the last one


class TextChunk(NamedTuple):
    """Non-empty part of a document."""

    text: str
    is_last: bool  # of the document
    bytes_read: int  # bytes of the file read so far


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Text file and its format."""

    path: Path
    kind: str  # a key of READERS, "text" or "python-help"
    column: str  # with the text; "" if rows are strings or no rows exist


def find_sources(paths: Sequence[str | Path], column: str = "") -> list[TextSource]:
    """Expands data set names, files, folders and globs to distinct files.

    A folder yields all files of a known type in it and its subfolders, sorted by name,
    without hidden ones.

    Args:
        paths: a name of a data set takes precedence over a file of that name.
        column: of JSON and CSV rows with the text; "" guesses it from the first row.

    Raises:
        DataError: no file was found, or a file has an unknown type.
    """
    files: dict[Path, Path] = {}  # resolved path to given path
    for path in paths:
        files |= {file.resolve(): file for file in expand_path(str(path))}
    sources = []
    for path in files.values():
        kind = file_kind(path)
        source = TextSource(path, kind, column)
        if kind in READERS and not column:
            with open_decompressed(path) as (file, _):
                line, row = next(READERS[kind](file, path), (0, ""))
            source = TextSource(path, kind, guess_column(row, f"{path}:{line}"))
        sources.append(source)
    return sources


def expand_path(path: str) -> list[Path]:
    """Returns the files that match a path, glob or data set name."""
    if path == datasets.PYTHON_HELP:
        return [Path(path)]
    if path in datasets.DATASETS:
        return [datasets.fetch_dataset(path)]
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        relative_paths = (file.relative_to(expanded) for file in sorted(expanded.rglob("*")))
        found = [
            expanded / file
            for file in relative_paths
            if not any(part.startswith(".") for part in file.parts)
            and suffix_without_gz(file) in FILE_KINDS
            and (expanded / file).is_file()
        ]
    elif expanded.is_file():
        found = [expanded]
    else:
        matches = sorted(glob.glob(str(expanded), recursive=True))
        found = [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        raise DataError(
            f"no text files found at {path}. Give a file, a folder or a glob of "
            f"{', '.join(FILE_KINDS)} files (also .gz), or a data set: "
            f"{', '.join([datasets.PYTHON_HELP, *datasets.DATASETS])}."
        )
    return found


def suffix_without_gz(path: Path) -> str:
    """Returns the lower-case file extension, ignoring .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def file_kind(path: Path) -> str:
    """Returns the format of a file: a key of `READERS`, "text" or "python-help"."""
    if str(path) == datasets.PYTHON_HELP:
        return datasets.PYTHON_HELP
    if suffix_without_gz(path) not in FILE_KINDS:
        raise DataError(
            f"unknown file type: {path}. Rename it to end in one of "
            f"{', '.join(FILE_KINDS)} (also .gz)."
        )
    return FILE_KINDS[suffix_without_gz(path)]


def guess_column(row: Any, location: str) -> str:
    """Guesses the text column from the first row."""
    if not isinstance(row, dict):
        return ""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    for known in TEXT_COLUMN_NAMES:
        if known in strings:
            return known
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"{location}: ambiguous text column; string columns: "
        f"{', '.join(strings) or 'none'}. Set --column NAME (data.text_column)."
    )


def iter_chunks(source: TextSource) -> Iterator[TextChunk]:
    """Yields the documents of one source in chunks.

    Raises:
        DataError: the text is invalid; the message names file and line.
    """
    path = source.path
    if source.kind == datasets.PYTHON_HELP:
        for text in datasets.read_python_help():
            yield from (TextChunk(*chunk, 0) for chunk in chunk_document([text]))
        return
    with open_decompressed(path) as (file, raw):
        if source.kind == "text":
            texts = (text for _, text in decode_utf8(read_blocks(file), path))
            yield from (TextChunk(*cut, raw.tell()) for cut in chunk_document(texts))
            return
        for line, row in READERS[source.kind](file, path):
            text = get_row_text(row, source.column, f"{path}:{line}")
            yield from (TextChunk(*cut, raw.tell()) for cut in chunk_document([text]))


def count_documents(sources: Sequence[TextSource], limit: int) -> int:
    """Counts documents, stopping above `limit`."""
    count = 0
    for source in sources:
        for chunk in iter_chunks(source):
            count += chunk.is_last or source.kind == "text"
            if source.kind == "text" or count > limit:
                break  # one document per file
    return count


def chunk_document(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Re-splits consecutive parts of one document; yields (text, is last)."""
    buffer = ""
    for text in texts:
        buffer += text
        while len(buffer) > CHUNK_CHARS:
            match = CHUNK_BOUNDARY.match(buffer, 0, CHUNK_CHARS + 1)
            end = match.end() - 1 if match else CHUNK_CHARS
            yield buffer[:end], False
            buffer = buffer[end:]
    if buffer:
        yield buffer, True


def get_row_text(row: Any, column: str, location: str) -> str:
    """Returns the text of one row."""
    if column and (not isinstance(row, dict) or column not in row):
        known = ", ".join(row) if isinstance(row, dict) else "none"
        raise DataError(
            f"{location}: no column {column!r}. Columns: {known}. Choose one with --column NAME."
        )
    text = row[column] if column else row
    if not isinstance(text, str):
        subject = f"column {column!r}" if column else "the row"
        raise DataError(f"{location}: {subject} is {text!r:.40}, not a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: unpaired surrogate {text[error.start]!r}. Write the character itself."
        ) from error
    if "\0" in text:
        raise DataError(f"{location}: NUL character in the text. Remove it.")
    return text


def read_text_file(path: Path) -> str:
    """Reads a whole text file with any file extension.

    Raises:
        DataError: the file cannot be read or is not valid UTF-8.
    """
    source = TextSource(path, "text", "")
    return "".join(chunk.text for chunk in iter_chunks(source))


class SplitSpan(NamedTuple):
    """Part of a document, assigned to a split."""

    split: str
    text: str
    is_first: bool  # of the document
    is_last: bool


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """Deterministic rule that selects the held-out text."""

    seed: int
    threshold: float  # documents whose hash is smaller are held out
    train_chars: int | None = None  # training characters of a single document


def hash_to_unit(seed: int, document_index: int) -> float:
    """Hashes a document number to a pseudorandom value in [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {document_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def make_split_rule(sources: Sequence[TextSource], val_fraction: float, seed: int) -> SplitRule:
    """Makes the rule that holds out a fraction of the documents.

    A small number of documents is counted, and those with the smallest hashes are held
    out: the given fraction, but at least one and not all. Of a single document, the
    last characters are held out, as nanoGPT does with tinyshakespeare.
    """
    if val_fraction == 0:
        return SplitRule(seed, 0.0)
    # With more documents than this, the probability that hashing alone holds out none
    # or all of them is below e^-50.
    max_counted = int(50 / min(val_fraction, 1 - val_fraction))
    count = count_documents(sources, max_counted)
    if count > max_counted:
        return SplitRule(seed, val_fraction)
    if count < 2:
        size = sum(len(chunk.text) for s in sources for chunk in iter_chunks(s))
        return SplitRule(seed, 0.0, train_chars=int(size * (1 - val_fraction)))
    num_held_out = min(max(round(val_fraction * count), 1), count - 1)
    return SplitRule(seed, sorted(hash_to_unit(seed, i) for i in range(count))[num_held_out])


def iter_split_spans(
    sources: Sequence[TextSource], rule: SplitRule, bar_label: str
) -> Iterator[SplitSpan]:
    """Yields all text of the sources in order, with its split.

    Args:
        sources: text files.
        rule: selects the held-out text.
        bar_label: label of the progress bar.
    """
    document_index, is_first, chars_read = 0, True, 0
    for chunk in iter_all_chunks(sources, bar_label):
        train_chars = rule.train_chars
        if train_chars is None:
            held_out = hash_to_unit(rule.seed, document_index) < rule.threshold
            yield SplitSpan(TEXT_SPLITS[held_out], chunk.text, is_first, chunk.is_last)
        else:
            head = chunk.text[: max(train_chars - chars_read, 0)]
            tail = chunk.text[max(train_chars - chars_read, 0) :]
            previous, chars_read = chars_read, chars_read + len(chunk.text)
            if head:
                yield SplitSpan(TRAIN_SPLIT, head, is_first, chars_read >= train_chars)
            if tail:
                yield SplitSpan(VALIDATION_SPLIT, tail, previous <= train_chars, chunk.is_last)
        document_index, is_first = document_index + chunk.is_last, chunk.is_last


def iter_all_chunks(sources: Sequence[TextSource], bar_label: str) -> Iterator[TextChunk]:
    """Yields all chunks of the sources; draws a progress bar on a terminal."""
    sizes = [0 if s.kind == PYTHON_HELP else s.path.stat().st_size for s in sources]
    bytes_done, last_drawn = 0, time.monotonic()
    for source, size in zip(sources, sizes, strict=True):
        for chunk in iter_chunks(source):
            yield chunk
            if time.monotonic() - last_drawn > PROGRESS_BAR_SECONDS and sys.stderr.isatty():
                last_drawn = time.monotonic()
                draw_progress_bar(bar_label, (bytes_done + chunk.bytes_read) / max(sum(sizes), 1))
        bytes_done += size
    clear_progress_bar()


def source_fingerprint(source: TextSource) -> dict[str, str]:
    """Identifies the text of a source by hash, independent of its folder."""
    if source.kind == PYTHON_HELP:
        digest = hashlib.sha256("\0".join(read_python_help()).encode()).hexdigest()
    else:
        digest = sha256_of_files([source.path])
    return {"file": source.path.name, "sha256": digest, "column": source.column}
