"""Documents from text, JSON and CSV files, in chunks of bounded size, and their split.

A .txt or .md file is one document, including any blank lines or `<|endoftext|>` in it;
each row of a table is one document; empty documents are dropped. Any of these files may
be compressed (.gz). Text is kept as it is, with line endings and spaces.

A document longer than `CHUNK_CHARS` characters is split into chunks, so that it need
not fit in memory. Chunks end before a space or newline that follows a non-space
character. No GPT-2 token spans such a position, so the chunks have the same tokens as
the document. Text without such a position is split after `CHUNK_CHARS` characters.

Documents are held out for validation by a hash of their number, so the split needs one
pass and depends on nothing but the seed.
"""

import glob
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.data.datasets import DATASETS, PYTHON_HELP, fetch_dataset, read_python_help
from gptjax.data.readers import (
    TABLE_FORMATS,
    count_chars,
    get_text,
    guess_text_column,
    read_rows,
    read_text_blocks,
    suffix_without_gz,
    unread_columns,
    visible_files,
)
from gptjax.data.token_files import is_prepared_dir
from gptjax.errors import DataError
from gptjax.fileio.download import sha256_of_files
from gptjax.fileio.paths import user_path
from gptjax.runtime.timing import log_progress

TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT = "train", "validation", "test"
ALL_SPLITS = (TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT)
TEXT_SPLITS = (TRAIN_SPLIT, VALIDATION_SPLIT)  # of pretraining data
CHUNK_CHARS = 1 << 18
DOCUMENT_SUFFIXES = (".txt", ".md")  # one document per file
SOURCE_SUFFIXES = (*DOCUMENT_SUFFIXES, *TABLE_FORMATS)
COLUMN_OPTION = "--column NAME (in training --data.text_column NAME)"
DOCUMENT_COLUMNS = ("text", "content", "document")  # usual names of the text column
CHUNK_BOUNDARY = re.compile(r"(?s).+(?<=\S)[ \n]")  # greedy: the last one


class TextChunk(NamedTuple):
    """Non-empty part of a document."""

    text: str
    is_last: bool  # of the document


class TextSource(NamedTuple):
    """Text file, or the help topics of Python (`PYTHON_HELP`)."""

    path: Path
    column: str  # with the text; "" if it is no table or its rows are strings


def find_sources(paths: Sequence[str | Path], column: str = "") -> list[TextSource]:
    """Expands data set names, files, folders and globs to distinct files.

    A folder yields all files of a known type in it and its subfolders, sorted by name,
    without hidden ones. The text column of tables is guessed from the first row if
    `column` is "".
    """
    files: dict[Path, Path] = {}  # resolved path to given path
    for path in paths:
        files |= {file.resolve(): file for file in expand_path(str(path))}
    sources = []
    for path in files.values():
        if str(path) != PYTHON_HELP and suffix_without_gz(path) not in SOURCE_SUFFIXES:
            raise DataError(
                f"{path}: the file type {path.suffix!r} is not supported. Convert it to one of "
                f"{', '.join(DOCUMENT_SUFFIXES)} (one document) or {', '.join(TABLE_FORMATS)} "
                "(one document per row), also gzipped."
            )
        source = TextSource(path, column)
        if suffix_without_gz(path) in TABLE_FORMATS and not column:
            location, row = next(read_rows(path), ("", ""))
            if isinstance(row, dict):
                column_guess = guess_text_column(row, location, COLUMN_OPTION, DOCUMENT_COLUMNS)
                source = TextSource(path, column_guess)
        sources.append(source)
    return sources


def expand_path(path: str) -> list[Path]:
    """Returns the files that match a path, glob or data set name."""
    if path == PYTHON_HELP:
        return [Path(path)]
    if path in DATASETS:
        return [fetch_dataset(path)]
    expanded = user_path(path)
    if expanded.is_dir():
        found = visible_files(expanded, SOURCE_SUFFIXES)
        for file in found:
            if file.name == "meta.json" and is_prepared_dir(file.parent):
                raise DataError(
                    f"{file.parent} is prepared data, not text. Pass a folder without it, or a "
                    f"glob such as {path}/*.txt."
                )
    else:
        matches = [expanded] if expanded.exists() else glob.glob(str(expanded), recursive=True)
        found = [file for file in map(Path, sorted(matches)) if file.is_file()]
    if not found:
        raise DataError(
            f"no text files found at {path}. Give a file, a folder or a glob of "
            f"{', '.join(SOURCE_SUFFIXES)} files (also .gz), or a data set: "
            f"{', '.join([PYTHON_HELP, *DATASETS])}."
        )
    return found


def iter_chunks(source: TextSource, unread: Counter[str] | None = None) -> Iterator[TextChunk]:
    """Yields the documents of one source in chunks.

    Adds the empty documents and the columns that are not read to the counts `unread`.
    """
    unread = Counter() if unread is None else unread
    if str(source.path) == PYTHON_HELP:
        documents = ([text] for text in read_python_help())
    elif suffix_without_gz(source.path) in TABLE_FORMATS:
        documents = read_documents(source, unread)
    else:
        documents = [read_text_blocks(source.path)]
    for document in documents:
        chunk = None
        for chunk in chunk_document(document):
            yield chunk
        unread.update(["empty documents"] * (chunk is None))


def read_documents(source: TextSource, unread: Counter[str]) -> Iterator[list[str]]:
    """Yields the text of each row of a table; counts its other columns."""
    for location, row in read_rows(source.path):
        yield [get_text(row, source.column, location, COLUMN_OPTION)]
        is_object = isinstance(row, dict)
        unread.update(unread_columns(row, (source.column,), location) if is_object else ())


def chunk_document(texts: Iterable[str]) -> Iterator[TextChunk]:
    """Re-splits consecutive parts of one document."""
    buffer = ""
    for text in texts:
        buffer, start = buffer + text, 0
        while len(buffer) - start > CHUNK_CHARS:
            match = CHUNK_BOUNDARY.match(buffer, start, start + CHUNK_CHARS + 1)
            end = match.end() - 1 if match else start + CHUNK_CHARS
            yield TextChunk(buffer[start:end], False)
            start = end
        buffer = buffer[start:]
    if buffer:
        yield TextChunk(buffer, True)


def iter_document_sizes(source: TextSource) -> Iterator[int]:
    """Yields the number of characters of each document of one source."""
    if suffix_without_gz(source.path) in DOCUMENT_SUFFIXES:
        if size := count_chars(source.path):
            yield size
        return
    size = 0
    for chunk in iter_chunks(source):
        size += len(chunk.text)
        if chunk.is_last:
            yield size
            size = 0


class SplitSpan(NamedTuple):
    """Part of a document, assigned to a split."""

    split: str
    text: str
    is_first: bool  # of the document
    is_last: bool


class SplitRule(NamedTuple):
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

    Of a small number of documents, at least one and not all are held out. Of a single
    document, the last characters are held out, as nanoGPT does with tinyshakespeare.
    """
    if val_fraction == 0:
        return SplitRule(seed, 0.0)
    # With more documents than this, the probability that hashing alone holds out none
    # or all of them is below e^-50.
    max_counted = int(50 / min(val_fraction, 1 - val_fraction))
    sizes = itertools.chain.from_iterable(map(iter_document_sizes, sources))
    first_sizes = [*itertools.islice(sizes, max_counted + 1)]
    if (count := len(first_sizes)) > max_counted:
        return SplitRule(seed, val_fraction)
    if count < 2:
        return SplitRule(seed, 0.0, train_chars=int(sum(first_sizes) * (1 - val_fraction)))
    num_held_out = min(max(round(val_fraction * count), 1), count - 1)
    return SplitRule(seed, sorted(hash_to_unit(seed, i) for i in range(count))[num_held_out])


def iter_split_spans(
    sources: Sequence[TextSource], rule: SplitRule, action: str, unread: Counter[str] | None = None
) -> Iterator[SplitSpan]:
    """Yields all text of the sources in order, with its split; see `iter_chunks`.

    `action`, the use of the text, is for progress messages.
    """
    document_index, is_first, chars_read = 0, True, 0
    chunks = itertools.chain.from_iterable(iter_chunks(source, unread) for source in sources)
    for chunk in log_progress(chunks, None, action, "texts, or parts of long ones"):
        if rule.train_chars is None:
            held_out = hash_to_unit(rule.seed, document_index) < rule.threshold
            yield SplitSpan(TEXT_SPLITS[held_out], chunk.text, is_first, chunk.is_last)
        else:
            remaining = rule.train_chars - chars_read
            head, tail = chunk.text[: max(remaining, 0)], chunk.text[max(remaining, 0) :]
            chars_read += len(chunk.text)
            if head:
                yield SplitSpan(TRAIN_SPLIT, head, is_first, chars_read >= rule.train_chars)
            if tail:
                yield SplitSpan(VALIDATION_SPLIT, tail, remaining >= 0, chunk.is_last)
        document_index, is_first = document_index + chunk.is_last, chunk.is_last


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time of a file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def source_fingerprint(source: TextSource) -> dict[str, str]:
    """Identifies the text of a source by hash, independent of its folder."""
    if str(source.path) == PYTHON_HELP:
        digest = hashlib.sha256("\0".join(read_python_help()).encode()).hexdigest()
    else:
        digest = sha256_of_files([source.path])
    return {"file": source.path.name, "sha256": digest, "column": source.column}
