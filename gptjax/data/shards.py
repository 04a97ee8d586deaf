"""Tokens on disk: written once, then read at any place without being loaded.

A prepared folder holds, for each split ("train", "validation"), the stream

    eot document eot document ... eot document eot

where eot is the tokenizer's end-of-text token: it starts every document, and a last
one lets the end of the last document be predicted too. The stream lies in shards,
all but the last of the same length:

    {split}-00000.bin   the tokens, little-endian u16 (u32 above 65,536 token types)
    {split}-00000.idx   little-endian u64: where in this shard documents end
    meta.json           what is in the folder, with the sha256 of each file
    tokenizer/          the tokenizer that made it

Folders of other programs are opened by `gptjax.data.foreign`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.download import sha256
from gptjax.errors import DataError

FORMAT = "gptjax tokens 1"
BLOCK = 1 << 20  # tokens that `verify` reads at a time


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type on disk that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends the tokens of one split to shards in a folder."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, length: int) -> None:
        """An empty split; `length` is the number of tokens of a full shard."""
        self.stem, self.dtype, self.length = folder / split, dtype, length
        self.shards: list[dict[str, Any]] = []  # finished ones, as in meta.json
        self.tokens = self.documents = 0  # in the unfinished one

    def add(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Appends tokens; `ends` says, in rising order, after which a document ends."""
        while len(tokens):
            room = self.length - self.tokens
            inside = int(np.searchsorted(ends, room, "right"))
            data = {".bin": tokens[:room].astype(self.dtype)}
            data[".idx"] = (ends[:inside] + self.tokens).astype("<u8")
            for suffix, array in data.items():
                with self.path(suffix).open("ab") as file:
                    file.write(array.tobytes())
            self.tokens += len(tokens[:room])
            self.documents += inside
            tokens, ends = tokens[room:], ends[inside:] - room
            if self.tokens == self.length:
                self.finish_shard()

    def path(self, suffix: str) -> Path:
        """The unfinished shard's file."""
        return Path(f"{self.stem}-{len(self.shards):05d}{suffix}")

    def finish_shard(self) -> None:
        """Adds the unfinished shard, if it holds anything, to the finished ones."""
        if self.tokens:
            shard = {
                "file": self.path(".bin").name,
                "tokens": self.tokens,
                "documents": self.documents,  # that end in it
                "sha256": [sha256([self.path(end)]) for end in (".bin", ".idx")],
            }
            self.shards.append(shard)
        self.tokens = self.documents = 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where one part of a stream lies."""

    path: Path
    tokens: int
    dtype: np.dtype
    skipped: int = 0  # bytes in front of the tokens
    index: Path | None = None  # u64 ends of documents
    documents: int = 0  # entries of the index


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A stream of tokens on disk, of which only what is read comes into memory."""

    shards: tuple[Shard, ...]
    maps: tuple[np.ndarray, ...]  # of the shards' tokens
    ends: tuple[np.ndarray, ...]  # of documents, counted from the shard's start
    firsts: np.ndarray  # position of each shard's first token, and the stream's length
    vocab_size: int
    eot: int  # the token that separates documents

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def documents(self) -> int:
        """The number of documents; 0 where there is no index."""
        return sum(map(len, self.ends))

    def read(self, start: int, count: int) -> np.ndarray:
        """The int32 tokens from position `start`, which need to exist.

        Raises:
            DataError: a token id is none of the tokenizer's. An accelerator would
                not notice: it reads the last row of the embedding instead.
        """
        block = np.empty(count, np.int32)
        done = 0
        number = int(np.searchsorted(self.firsts, start, "right")) - 1
        while done < count:
            inside = start + done - int(self.firsts[number])
            part = self.maps[number][inside : inside + count - done]
            if part.max() >= self.vocab_size:
                self.refuse(number, inside, part)
            block[done : done + len(part)] = part
            done, number = done + len(part), number + 1
        return block

    def refuse(self, number: int, inside: int, part: np.ndarray) -> None:
        """Raises for the first token of the part that is out of range."""
        bad = int(np.argmax(part >= self.vocab_size))
        raise DataError(
            f"{self.shards[number].path}: token {part[bad]} at offset {inside + bad} "
            f"is out of range, the tokenizer has {self.vocab_size}. The file is "
            "damaged or was made with another tokenizer: prepare the text again."
        )

    def document(self, number: int) -> tuple[int, int]:
        """(start, stop) of a document, the separator in front of it included."""
        counts = np.cumsum([0, *map(len, self.ends)])

        def end(number: int) -> int:
            shard = int(np.searchsorted(counts, number, "right")) - 1
            return int(self.firsts[shard] + self.ends[shard][number - counts[shard]])

        return end(number - 1) if number else 0, end(number)


def open_shards(shards: Sequence[Shard], vocab_size: int, eot: int) -> Tokens:
    """The stream that the shards make up.

    Raises:
        DataError: a file is missing or not as long as it has to be.
    """
    maps, ends = [], []
    for shard in shards:
        size = shard.skipped + shard.tokens * shard.dtype.itemsize
        check_size(shard.path, max(size, 1))
        tokens = np.memmap(shard.path, shard.dtype, "r", shard.skipped, shard.tokens)
        maps.append(np.asarray(tokens))  # reads several times as fast as a memmap
        ends.append(np.empty(0, "<u8"))
        if shard.index and shard.documents:
            check_size(shard.index, 8 * shard.documents)
            ends[-1] = np.asarray(np.memmap(shard.index, "<u8", "r"))
    firsts = np.cumsum([0, *(shard.tokens for shard in shards)])
    return Tokens(tuple(shards), tuple(maps), tuple(ends), firsts, vocab_size, eot)


def check_size(path: Path, size: int) -> None:
    """Raises unless the file has that many bytes."""
    found = path.stat().st_size if path.exists() else 0
    if found != size:
        raise DataError(
            f"{path} has {found:,} bytes instead of {size:,}: it is missing, cut off "
            "or damaged. Copy it or prepare the text again."
        )


def is_prepared(folder: Path) -> bool:
    """Whether the folder was finished by `gptjax data prepare`."""
    try:
        return '"gptjax tokens ' in (folder / "meta.json").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a prepared folder.

    Raises:
        DataError: it is no prepared folder, or one of another version.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
        found = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {path}: {error}. Give a folder that `gptjax data prepare` "
            "wrote."
        ) from error
    if found != FORMAT:
        raise DataError(
            f"{path} has the format {found!r}, not {FORMAT!r}. Prepare the text again."
        )
    return meta


def open_tokens(folder: Path, split: str) -> Tokens:
    """One split of a prepared folder.

    Raises:
        DataError: there is no such split, or the folder is damaged; only the sizes
            of its files are looked at.
    """
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise DataError(
            f"{folder} has no split {split!r}, only {', '.join(meta['splits'])}. "
            "Prepare the text again with --val-fraction 0.1."
        )
    shards = [
        Shard(
            folder / shard["file"],
            shard["tokens"],
            np.dtype(meta["dtype"]),
            index=(folder / shard["file"]).with_suffix(".idx"),
            documents=shard["documents"],
        )
        for shard in meta["splits"][split]["shards"]
    ]
    return open_shards(shards, meta["vocab_size"], meta["eot"])


def verify(folder: Path) -> list[str]:
    """What is wrong with a prepared folder, after reading all of it.

    Raises:
        DataError: it is no prepared folder.
    """
    problems = []
    for split, entry in read_meta(folder)["splits"].items():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            files = (path, path.with_suffix(".idx"))
            for file, expected in zip(files, shard["sha256"], strict=True):
                found = sha256([file]) if file.exists() else "missing"
                if found != expected:
                    problems.append(f"{file}: sha256 {found}, expected {expected}")
        try:
            tokens = open_tokens(folder, split)
            for start in range(0, len(tokens), BLOCK):
                tokens.read(start, min(BLOCK, len(tokens) - start))
        except DataError as error:
            problems.append(str(error))
    return problems
