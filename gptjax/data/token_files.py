"""Memory-mapped token files.

A prepared folder holds, for each split ("train", "validation"), the stream

    eot document eot document ... eot document eot

where eot is the tokenizer's end-of-text token. It precedes every document, and also
ends the stream, as the target after the last document. A document starts with the BOS
token if the tokenizer adds one. The stream is stored in shards, all but the last of the
same length:

    {split}-00000.bin   tokens, little-endian u16 (u32 above 65,536 token types)
    {split}-00000.idx   little-endian u64: ends of documents in this shard
    meta.json           description, with the SHA-256 of each file and the CRC-32 of
                        each `CRC_BLOCK_BYTES` of tokens
    sources.jsonl       name, SHA-256 and text column of each file of the text
    tokenizer/          tokenizer of the data

The CRC of a block is verified when the block is first read: opening is cheap, and no
corrupt token is trained on.

`open_external` opens token files of datatrove.
"""

import dataclasses
import functools
import hashlib
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.errors import DataError
from gptjax.fileio.download import sha256_of_files
from gptjax.fileio.paths import user_path
from gptjax.fileio.strict_json import read_json, read_small_file

TOKEN_FILES_FORMAT = "gptjax tokens 2"
CRC_BLOCK_BYTES = 1 << 20  # per CRC
MAX_TOKEN_METADATA_BYTES = 1 << 26  # size of a meta.json
SOURCES_FILE = "sources.jsonl"
# Fields of `DataConfig` that have no effect on tokens that are already in files.
SPLIT_OPTIONS = ("text_column", "val_fraction", "split_seed")
REPREPARE_ADVICE = "Copy the folder again, or prepare the text again."


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype on disk that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends the tokens of one split to shards in a folder."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        """Starts an empty split with `shard_tokens` tokens per full shard."""
        self.stem, self.dtype, self.shard_tokens = folder / split, dtype, shard_tokens
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}
        self.shards: list[dict[str, Any]] = []  # finished, as in meta.json
        self.start_shard()

    def append(self, tokens: np.ndarray, document_ends: np.ndarray, num_bytes: int) -> None:
        """Appends tokens of `num_bytes` of text; `document_ends` are ascending."""
        self.counts["documents"] += len(document_ends)
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += num_bytes
        while len(tokens):
            remaining = self.shard_tokens - self.tokens
            num_ends = int(np.searchsorted(document_ends, remaining, "right"))
            part = tokens[:remaining].astype(self.dtype, copy=False)
            data = {".bin": part, ".idx": (document_ends[:num_ends] + self.tokens).astype("<u8")}
            for suffix, array in data.items():
                with self.path(suffix).open("ab") as file:
                    file.write(array.data)
                self.digests[suffix].update(array.data)
            self.update_crcs(part.view(np.uint8))
            self.tokens += len(part)
            self.documents += num_ends
            tokens = tokens[remaining:]
            document_ends = document_ends[num_ends:] - remaining
            if self.tokens == self.shard_tokens:
                self.finish_shard()

    def path(self, suffix: str) -> Path:
        """Returns the path of a file of the unfinished shard."""
        return Path(f"{self.stem}-{len(self.shards):05d}{suffix}")

    def start_shard(self) -> None:
        """Starts an empty shard."""
        self.tokens = self.documents = 0
        self.digests = {suffix: hashlib.sha256() for suffix in (".bin", ".idx")}
        self.crcs: list[int] = []

    def update_crcs(self, data: np.ndarray) -> None:
        """Updates the CRCs of the shard's blocks with the appended bytes."""
        offset = self.tokens * self.dtype.itemsize % CRC_BLOCK_BYTES
        while len(data):
            self.crcs += [] if offset else [0]
            part, data = np.split(data, [CRC_BLOCK_BYTES - offset])
            self.crcs[-1], offset = zlib.crc32(part.data, self.crcs[-1]), 0

    def finish_shard(self) -> None:
        """Finishes the current shard and starts the next one."""
        self.shards.append(
            {
                "file": self.path(".bin").name,
                "tokens": self.tokens,
                "documents": self.documents,  # ending in this shard
                "sha256": [digest.hexdigest() for digest in self.digests.values()],
                "crc32": self.crcs,
            }
        )
        self.start_shard()

    def finish(self) -> dict[str, Any]:
        """Finishes the last shard; returns the entry of the split in meta.json."""
        if self.tokens:
            self.finish_shard()
        return {**self.counts, "shards": self.shards}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenShard:
    """Memory-mapped file with one part of a token stream."""

    path: Path
    tokens: np.ndarray
    sha256: str  # "" = unknown
    block_crcs: Sequence[int]
    verified: np.ndarray  # bool per block, updated by `verify_blocks`

    def verify_blocks(self, start: int, count: int) -> None:
        """Verifies the CRCs of the blocks of a range that were not yet verified."""
        itemsize, data = self.tokens.itemsize, self.tokens.view(np.uint8)
        first, stop = start * itemsize // CRC_BLOCK_BYTES, num_blocks((start + count) * itemsize)
        for block in (first + np.flatnonzero(~self.verified[first:stop])).tolist():
            begin = block * CRC_BLOCK_BYTES
            block_bytes = data[begin : begin + CRC_BLOCK_BYTES]
            actual, expected = zlib.crc32(block_bytes.data), self.block_crcs[block]
            if actual != expected:
                raise DataError(
                    f"{self.path}: block {block}, bytes {begin:,} to "
                    f"{begin + len(block_bytes) - 1:,}, has CRC-32 {actual:08x}, expected "
                    f"{expected:08x}: the file is corrupt or was replaced. {REPREPARE_ADVICE}"
                )
            self.verified[block] = True


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDataset:
    """Memory-mapped stream of tokens."""

    shards: Sequence[TokenShard]
    vocab_size: int
    eot: int  # token that separates documents
    unread: str = ""  # parts of the text that were not read; see `describe_unread`

    @functools.cached_property
    def shard_offsets(self) -> np.ndarray:
        """First position of each shard, then the length of the stream."""
        return np.cumsum([0, *(len(shard.tokens) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.shard_offsets[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads tokens as int32; the range must lie inside the stream.

        A corrupt block is a DataError, as is a token id out of range: accelerators
        clamp the index of the embedding without a report.
        """
        tokens = np.empty(count, np.int32)
        done = 0
        shard_index = int(np.searchsorted(self.shard_offsets, start, "right")) - 1
        while done < count:
            shard = self.shards[shard_index]
            offset = start + done - int(self.shard_offsets[shard_index])
            chunk = shard.tokens[offset : offset + count - done]
            shard.verify_blocks(offset, len(chunk))
            if chunk.max() >= self.vocab_size:
                invalid = int(np.argmax(chunk >= self.vocab_size))
                raise DataError(
                    f"{shard.path}: token {chunk[invalid]} at offset {offset + invalid} is "
                    f"out of range for vocab_size={self.vocab_size}. The file is corrupt or "
                    "was made with another tokenizer; prepare the text again."
                )
            tokens[done : done + len(chunk)] = chunk
            done, shard_index = done + len(chunk), shard_index + 1
        return tokens


def num_blocks(num_bytes: int) -> int:
    """Returns the number of blocks with a CRC each."""
    return -(-num_bytes // CRC_BLOCK_BYTES)


def open_shard(
    path: Path, count: int, dtype: np.dtype, sha256: str = "", block_crcs: Sequence[int] = ()
) -> TokenShard:
    """Opens a file of `count` tokens, at least one; checks its size."""
    size, actual = count * dtype.itemsize, path.stat().st_size if path.is_file() else 0
    if actual != size:
        raise DataError(
            f"{path} has {actual:,} bytes instead of {size:,}: it is missing, truncated or "
            "corrupt. Copy it again, or prepare the text again."
        )
    # An array is several times as fast to read as a memmap.
    tokens = np.asarray(np.memmap(path, dtype, "r", shape=(count,)))
    return TokenShard(path, tokens, sha256, block_crcs, np.full(num_blocks(size), not block_crcs))


def is_prepared_dir(folder: Path) -> bool:
    """Returns True if the folder was written by `gptjax data prepare`."""
    try:
        return b'"gptjax tokens ' in read_small_file(folder / "meta.json", MAX_TOKEN_METADATA_BYTES)
    except (OSError, ValueError):
        return False


def reset_split_options(config: DataConfig, given: Collection[str]) -> DataConfig:
    """Resets options that prepared data does not have, except those `given`."""
    if not is_prepared_dir(user_path(config.source)):
        return config
    names = {"tokenizer", *SPLIT_OPTIONS}.difference(given)
    return dataclasses.replace(config, **{name: getattr(DataConfig(), name) for name in names})


def read_token_metadata(folder: Path) -> dict[str, Any]:
    """Reads the meta.json of a prepared folder."""
    path = folder / "meta.json"
    try:
        meta = read_json(path, MAX_TOKEN_METADATA_BYTES)
        file_format = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {path}: {error}. Give a folder written by `gptjax data prepare`."
        ) from error
    if file_format != TOKEN_FILES_FORMAT:
        raise DataError(
            f"{path} has the format {file_format!r:.40}, expected "
            f"{TOKEN_FILES_FORMAT!r}. Prepare the text again."
        )
    if not _is_valid_metadata(meta):
        raise DataError(f"{path} is not valid metadata of token files. {REPREPARE_ADVICE}")
    return meta


def _is_valid_metadata(meta: dict[str, Any]) -> bool:
    """True if all entries needed to open the splits are valid."""
    match meta:
        case {
            "dtype": str(dtype),
            "vocab_size": int(size),
            "eot": int(eot),
            "tokenizer": {"name": str(), "hash": str()},
            "splits": dict(splits),
        } if 0 <= eot < size and token_dtype(size).str == dtype:
            itemsize = np.dtype(dtype).itemsize
            return all(_is_valid_split(name, entry, itemsize) for name, entry in splits.items())
    return False


def _is_valid_split(name: str, entry: Any, itemsize: int) -> bool:
    """True if the name and the entry of one split are valid."""
    match entry:
        case {"documents": int(), "tokens": int(), "bytes": int(), "shards": [_, *_] as shards}:
            return re.fullmatch("[a-z]+", name) is not None and all(
                _is_valid_shard(shard, f"{name}-{n:05d}.bin", itemsize)
                for n, shard in enumerate(shards)
            )
    return False


def _is_valid_shard(entry: Any, file: str, itemsize: int) -> bool:
    """True if the entry of one shard is valid and names `file`."""
    match entry:
        case {"file": name, "tokens": int(tokens), "sha256": [str(), str()], "crc32": list(crcs)}:
            is_complete = len(crcs) == num_blocks(tokens * itemsize) > 0
            return name == file and is_complete and all(isinstance(crc, int) for crc in crcs)
    return False


def open_split(folder: Path, split: str) -> TokenDataset:
    """Opens one split of a prepared folder; only the sizes of files are checked."""
    meta = read_token_metadata(folder)
    if split not in meta["splits"]:
        raise DataError(
            f"{folder} has no split {split!r}, only {', '.join(meta['splits'])}. "
            "Prepare the text again with --val-fraction 0.1."
        )
    dtype = np.dtype(meta["dtype"])
    shards = [
        open_shard(folder / x["file"], x["tokens"], dtype, x["sha256"][0], x["crc32"])
        for x in meta["splits"][split]["shards"]
    ]
    # Folders of earlier versions have no "unread".
    return TokenDataset(shards, meta["vocab_size"], meta["eot"], str(meta.get("unread", "")))


def verify_prepared(folder: Path) -> list[str]:
    """Reads a whole prepared folder; returns a message for each problem."""
    problems, meta, hashes = [], read_token_metadata(folder), {}
    match meta:
        case {"recipe": {"sources": str(digest)}}:
            hashes[folder / SOURCES_FILE] = digest
    for entry in meta["splits"].values():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            hashes |= zip((path, path.with_suffix(".idx")), shard["sha256"], strict=True)
    for file, expected in hashes.items():
        found = sha256_of_files([file]) if file.is_file() else "missing"
        if found != expected:
            problems.append(f"{file}: sha256 {found}, expected {expected}")
    for split in meta["splits"]:
        try:
            tokens = open_split(folder, split)
            for start in range(0, len(tokens), CRC_BLOCK_BYTES):
                tokens.read(start, min(CRC_BLOCK_BYTES, len(tokens) - start))
        except DataError as error:
            problems.append(str(error))
    return problems


def open_external(folder: Path, split: str, vocab_size: int, eot: int) -> TokenDataset | None:
    """Opens one split of .ds files; those with "val" in their name are validation."""
    shards = [
        datatrove_shard(path, eot)
        for path in sorted(folder.glob("*.ds"))
        if ("val" in path.name) == (split == "validation")
    ]
    return TokenDataset(shards, vocab_size, eot) if shards else None


def datatrove_shard(path: Path, eot: int) -> TokenShard:
    """Opens a .ds file; its dtype follows from the last entry of its .index."""
    index = path.with_name(path.name + ".index")
    ends = np.fromfile(index, "<u8") if index.is_file() else np.empty(0, "<u8")
    size = path.stat().st_size
    last = int(ends[-1]) if len(ends) else 0
    if size not in (2 * last, 4 * last) or not size:
        raise DataError(
            f"{path} has {size:,} bytes, but the last entry of {index.name} is "
            f"{last:,}, neither half nor a quarter of that. Copy both files again."
        )
    shard = open_shard(path, last, np.dtype(f"<u{size // last}"))
    end_token = shard.tokens[int(ends[0]) - 1]
    if end_token != eot:
        raise DataError(
            f"{path}: the first document ends with token {end_token}, not with the "
            f"end-of-text token {eot}. Set data.tokenizer to the tokenizer of the "
            "file, or write the file again with an eos_token."
        )
    return shard
