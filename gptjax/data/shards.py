"""Tokens on disk: written once, then read at any place without being loaded.

A prepared folder holds, for each split ("train", "validation"), the stream

    eot document eot document ... eot document eot

where eot is the tokenizer's end-of-text token: it starts every document, and a last
one lets the end of the last document be predicted too. The stream lies in shards,
all but the last of the same length:

    {split}-00000.bin   the tokens, little-endian u16 (u32 above 65,536 token types)
    {split}-00000.idx   little-endian u64: where in this shard documents end
    meta.json           what is in the folder, with the sha256 of each file and the
                        CRC-32 of each `BLOCK` bytes of tokens
    tokenizer/          the tokenizer that made it

A block is compared with its CRC when it is first read, so that opening costs nothing
and no damaged token is trained on.

Folders of other programs are opened by `gptjax.data.foreign`.
"""

import dataclasses
import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.download import sha256
from gptjax.errors import DataError
from gptjax.strict_json import read_json

FORMAT = "gptjax tokens 2"
BLOCK = 1 << 20  # bytes that have a CRC
META_BYTES = 1 << 26  # of a meta.json
AGAIN = "Copy the folder again, or prepare the text again."


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
            digest, crcs = digests(self.path(".bin"))
            shard = {
                "file": self.path(".bin").name,
                "tokens": self.tokens,
                "documents": self.documents,  # that end in it
                "sha256": [digest, sha256([self.path(".idx")])],
                "crc32": crcs,
            }
            self.shards.append(shard)
        self.tokens = self.documents = 0


def digests(path: Path) -> tuple[str, list[int]]:
    """The sha256 of a file, and the CRC-32 of each block of it."""
    digest, crcs = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            crcs.append(zlib.crc32(block))
    return digest.hexdigest(), crcs


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where one part of a stream lies."""

    path: Path
    tokens: int
    dtype: np.dtype
    skipped: int = 0  # bytes in front of the tokens
    index: Path | None = None  # u64 ends of documents
    documents: int = 0  # entries of the index
    sha256: tuple[str, ...] = ()  # of both files; () = unknown
    crcs: tuple[int, ...] = ()  # of the blocks; () = unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A stream of tokens on disk, of which only what is read comes into memory."""

    shards: tuple[Shard, ...]
    maps: tuple[np.ndarray, ...]  # of the shards' tokens
    sound: tuple[np.ndarray, ...]  # which blocks have been compared; grows with reading
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
            DataError: a block is not what was written, or a token id is none of the
                tokenizer's. An accelerator would not notice: it reads the last row of
                the embedding instead.
        """
        block = np.empty(count, np.int32)
        done = 0
        number = int(np.searchsorted(self.firsts, start, "right")) - 1
        while done < count:
            inside = start + done - int(self.firsts[number])
            part = self.maps[number][inside : inside + count - done]
            self.compare(number, inside, len(part))
            if part.max() >= self.vocab_size:
                self.refuse(number, inside, part)
            block[done : done + len(part)] = part
            done, number = done + len(part), number + 1
        return block

    def compare(self, number: int, inside: int, count: int) -> None:
        """Compares the blocks of some tokens of a shard with their CRCs, once each."""
        size, sound = self.shards[number].dtype.itemsize, self.sound[number]
        first, stop = inside * size // BLOCK, -(-(inside + count) * size // BLOCK)
        if sound[first:stop].all():
            return
        data = self.maps[number].view(np.uint8)
        for block in range(first, stop):
            found = zlib.crc32(data[block * BLOCK : (block + 1) * BLOCK].data)
            due = self.shards[number].crcs[block]
            if found != due:
                last = min((block + 1) * BLOCK, len(data)) - 1
                raise DataError(
                    f"{self.shards[number].path}: block {block}, bytes "
                    f"{block * BLOCK:,} to {last:,}, has the CRC-32 {found:08x}, but "
                    f"{due:08x} was written: it is damaged, or of another file. {AGAIN}"
                )
            sound[block] = True

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
        DataError: a file is missing or not as long as it has to be, or an index is not
            the one that was written.
    """
    maps, sound, ends = [], [], []
    for shard in shards:
        size = shard.skipped + shard.tokens * shard.dtype.itemsize
        check_size(shard.path, max(size, 1))
        tokens = np.memmap(shard.path, shard.dtype, "r", shard.skipped, shard.tokens)
        maps.append(np.asarray(tokens))  # reads several times as fast as a memmap
        unknown = not shard.crcs
        sound.append(np.full(-(-tokens.nbytes // BLOCK), unknown))
        ends.append(np.empty(0, "<u8"))
        if shard.index and shard.documents:
            check_size(shard.index, 8 * shard.documents)
            if shard.sha256 and sha256([shard.index]) != shard.sha256[1]:
                raise DataError(
                    f"{shard.index}: block 0, bytes 0 to {8 * shard.documents - 1:,}, "
                    "is not what was written: the ends of documents are damaged, or of "
                    f"another file. {AGAIN}"
                )
            ends[-1] = np.asarray(np.memmap(shard.index, "<u8", "r"))
    firsts = np.cumsum([0, *(shard.tokens for shard in shards)])
    return Tokens(
        tuple(shards), tuple(maps), tuple(sound), tuple(ends), firsts, vocab_size, eot
    )


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
        DataError: it is no prepared folder, one of another version, or damaged.
    """
    path = folder / "meta.json"
    try:
        meta = read_json(path, META_BYTES)
        found = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {path}: {error}. Give a folder that `gptjax data prepare` "
            "wrote."
        ) from error
    if found != FORMAT:
        raise DataError(
            f"{path} has the format {found!r:.40}, not {FORMAT!r}. Prepare the text "
            "again."
        )
    if not well_formed(meta):
        raise DataError(f"{path} does not describe tokens: it is damaged. {AGAIN}")
    return meta


def well_formed(meta: dict[str, Any]) -> bool:
    """Whether all is there that opening the splits relies on, and is possible."""
    match meta:
        case {
            "dtype": "<u2" | "<u4" as dtype,
            "vocab_size": int(size),
            "eot": int(eot),
            "tokenizer": {"name": str(), "hash": str()},
            "splits": dict(splits),
        } if 0 <= eot < size and token_type(size).str == dtype:
            width = np.dtype(dtype).itemsize
            return all(
                re.fullmatch("[a-z]+", split) and well_formed_split(split, entry, width)
                for split, entry in splits.items()
            )
    return False


def well_formed_split(split: str, entry: Any, width: int) -> bool:
    """The same for one split, whose tokens take `width` bytes each."""
    match entry:
        case {
            "documents": int(),
            "tokens": int(),
            "bytes": int(),
            "shards": [_, *_] as shards,
        }:
            pass
        case _:
            return False
    for number, shard in enumerate(shards):
        match shard:
            case {
                "file": str(file),
                "tokens": int(tokens),
                "documents": int(documents),
                "sha256": [str(), str()],
                "crc32": list(crcs),
            } if file == f"{split}-{number:05d}.bin" and 0 <= documents <= tokens:
                blocks = -(-tokens * width // BLOCK)
                whole = all(type(crc) is int and 0 <= crc < 1 << 32 for crc in crcs)
                if whole and tokens and len(crcs) == blocks:
                    continue
        return False
    return True


def open_tokens(folder: Path, split: str) -> Tokens:
    """One split of a prepared folder.

    Raises:
        DataError: there is no such split, or the folder is damaged; of the tokens,
            only the sizes of their files are looked at.
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
            sha256=tuple(shard["sha256"]),
            crcs=tuple(shard["crc32"]),
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
