"""Which documents are held out, and all text on its way to one split or the other."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptjax.data.named import PYTHON_HELP, python_help
from gptjax.data.text import Piece, Source, count_documents, read_pieces
from gptjax.download import BAR_SECONDS, clear_bar, draw_bar, sha256

TRAIN, VALIDATION = SPLITS = ("train", "validation")


class Part(NamedTuple):
    """Some characters of a document on their way to a split."""

    split: str
    text: str
    first: bool  # of its document
    last: bool


@dataclasses.dataclass(frozen=True)
class Division:
    """A rule for what is held out; the same on every machine."""

    seed: int
    below: float  # documents whose draw is smaller are held out
    cut: int | None = None  # of a single document, characters that are not held out


def draw(seed: int, number: int) -> float:
    """A number in [0, 1) that a document gets by lot."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def divide(sources: Sequence[Source], val_fraction: float, seed: int) -> Division:
    """The rule that holds out a fraction of the documents.

    Few documents are counted, and those with the smallest draws are held out: as many
    as the fraction says, but at least one, and not all. A single document is cut at
    the fraction of its characters, as nanoGPT does with tinyshakespeare.
    """
    if val_fraction == 0:
        return Division(seed, 0.0)
    # With more documents than this, the chance that the draws alone hold out none or
    # all of them is below e^-50.
    many = int(50 / min(val_fraction, 1 - val_fraction))
    count = count_documents(sources, many)
    if count > many:
        return Division(seed, val_fraction)
    if count < 2:
        size = sum(len(piece.text) for s in sources for piece in read_pieces(s))
        return Division(seed, 0.0, cut=int(size * (1 - val_fraction)))
    held_out = min(max(round(val_fraction * count), 1), count - 1)
    return Division(seed, sorted(draw(seed, i) for i in range(count))[held_out])


def read_parts(
    sources: Sequence[Source], division: Division, doing: str
) -> Iterator[Part]:
    """All text of the sources, in order, each part with its split.

    Args:
        sources: of the text.
        division: says which documents are held out.
        doing: word for the progress bar.
    """
    number, first, seen = 0, True, 0
    for piece in read_all(sources, doing):
        cut = division.cut
        if cut is None:
            held_out = draw(division.seed, number) < division.below
            yield Part(SPLITS[held_out], piece.text, first, piece.last)
        else:
            head, tail = (
                piece.text[: max(cut - seen, 0)],
                piece.text[max(cut - seen, 0) :],
            )
            before, seen = seen, seen + len(piece.text)
            if head:
                yield Part(TRAIN, head, first, seen >= cut)
            if tail:
                yield Part(VALIDATION, tail, before <= cut, piece.last)
        number, first = number + piece.last, piece.last


def read_all(sources: Sequence[Source], doing: str) -> Iterator[Piece]:
    """All pieces of the sources; on a terminal, a bar shows how far it is."""
    sizes = [0 if s.kind == PYTHON_HELP else s.path.stat().st_size for s in sources]
    done, shown = 0, time.monotonic()
    for source, size in zip(sources, sizes, strict=True):
        for piece in read_pieces(source):
            yield piece
            if time.monotonic() - shown > BAR_SECONDS and sys.stderr.isatty():
                shown = time.monotonic()
                draw_bar(doing, (done + piece.offset) / max(sum(sizes), 1))
        done += size
    clear_bar()


def fingerprint(source: Source) -> dict[str, str]:
    """What tells the text of a source from other text, wherever it lies."""
    if source.kind == PYTHON_HELP:
        digest = hashlib.sha256("\0".join(python_help()).encode()).hexdigest()
    else:
        digest = sha256([source.path])
    return {"file": source.path.name, "sha256": digest, "column": source.column}
