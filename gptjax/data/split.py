"""Train/validation split of documents by hash."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptjax.data.named import PYTHON_HELP, read_python_help
from gptjax.data.text import TextChunk, TextSource, count_documents, iter_chunks
from gptjax.download import (
    PROGRESS_BAR_SECONDS,
    clear_progress_bar,
    draw_progress_bar,
    sha256_of_files,
)

TRAIN_SPLIT, VALIDATION_SPLIT = TEXT_SPLITS = ("train", "validation")


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
    digest = hashlib.blake2b(
        f"{seed} {document_index}".encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") / 2**64


def make_split_rule(
    sources: Sequence[TextSource], val_fraction: float, seed: int
) -> SplitRule:
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
    return SplitRule(
        seed, sorted(hash_to_unit(seed, i) for i in range(count))[num_held_out]
    )


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
            head, tail = (
                chunk.text[: max(train_chars - chars_read, 0)],
                chunk.text[max(train_chars - chars_read, 0) :],
            )
            previous, chars_read = chars_read, chars_read + len(chunk.text)
            if head:
                yield SplitSpan(TRAIN_SPLIT, head, is_first, chars_read >= train_chars)
            if tail:
                yield SplitSpan(
                    VALIDATION_SPLIT, tail, previous <= train_chars, chunk.is_last
                )
        document_index, is_first = document_index + chunk.is_last, chunk.is_last


def iter_all_chunks(
    sources: Sequence[TextSource], bar_label: str
) -> Iterator[TextChunk]:
    """Yields all chunks of the sources; draws a progress bar on a terminal."""
    sizes = [0 if s.kind == PYTHON_HELP else s.path.stat().st_size for s in sources]
    bytes_done, last_drawn = 0, time.monotonic()
    for source, size in zip(sources, sizes, strict=True):
        for chunk in iter_chunks(source):
            yield chunk
            if (
                time.monotonic() - last_drawn > PROGRESS_BAR_SECONDS
                and sys.stderr.isatty()
            ):
                last_drawn = time.monotonic()
                draw_progress_bar(
                    bar_label, (bytes_done + chunk.bytes_read) / max(sum(sizes), 1)
                )
        bytes_done += size
    clear_progress_bar()


def source_fingerprint(source: TextSource) -> dict[str, str]:
    """Identifies the text of a source by hash, independent of its folder."""
    if source.kind == PYTHON_HELP:
        digest = hashlib.sha256("\0".join(read_python_help()).encode()).hexdigest()
    else:
        digest = sha256_of_files([source.path])
    return {"file": source.path.name, "sha256": digest, "column": source.column}
