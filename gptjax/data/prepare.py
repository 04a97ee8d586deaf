"""From text to a prepared folder of tokens, and from a config to its data."""

import dataclasses
import json
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax import tokenizer as tokenizers
from gptjax.config import DataConfig
from gptjax.data.foreign import open_foreign, token_files
from gptjax.data.named import NAMED, PYTHON_HELP
from gptjax.data.shards import (
    FORMAT,
    ShardWriter,
    Tokens,
    is_prepared,
    open_tokens,
    read_meta,
    token_type,
)
from gptjax.data.split import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Division,
    Part,
    divide,
    fingerprint,
    read_parts,
)
from gptjax.data.text import Source, find_sources
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000
TASK = 1 << 17  # characters, about what one worker encodes at a time


class Dataset(NamedTuple):
    """What a run reads."""

    train: Tokens
    validation: Tokens | None
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is in a prepared folder; as a string, a few lines for people."""

    folder: Path
    meta: dict[str, Any]
    # That it took; 0 where it was there already.
    seconds: float = dataclasses.field(default=0.0, compare=False)

    def speed(self, workers: int) -> str:
        """How fast that was, for people; "" where nothing was to do."""
        size = sum(entry["bytes"] for entry in self.meta["splits"].values()) / 1e6
        if not self.seconds:
            return ""
        rate = size / self.seconds
        each = f"{rate / workers:.1f} for each of {workers} workers"
        return f"{size:.1f} MB of text in {self.seconds:.1f} s: {rate:.1f} MB/s, {each}"

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.meta['tokenizer']['name']} tokens of"]
        for source in self.meta["recipe"]["sources"]:
            column = f", column {source['column']!r}" if source["column"] else ""
            lines.append(f"  {source['file']}{column}")
        for split, entry in self.meta["splits"].items():
            lines.append(
                f"{split:<11}{entry['documents']:>12,} documents"
                f"{entry['tokens']:>16,} tokens"
                f"{entry['bytes'] / entry['tokens']:>8.3f} bytes per token"
            )
        return "\n".join(lines)


def open_dataset(config: DataConfig, folder: Path) -> Dataset:
    """The tokens that a config names: opened, or first prepared into `folder`.

    Args:
        config: its source is a folder of tokens, or the text to prepare.
        folder: of the run, for prepared tokens; used again if they are the same.

    Raises:
        DataError: the text or the tokens cannot be used, or not with the tokenizer.
    """
    source = Path(config.source).expanduser()
    if is_prepared(source):
        return open_prepared(source, config.tokenizer)
    if config.source not in (PYTHON_HELP, *NAMED) and token_files(source):
        tokenizer = tokenizers.load(config.tokenizer or "gpt2")
        both = [
            open_foreign(source, split, tokenizer.vocab_size, tokenizer.eot)
            for split in SPLITS
        ]
        if both[0] is None:
            raise DataError(
                f"{source} has tokens for validation only. Add a file to train on."
            )
        return Dataset(both[0], both[1], tokenizer)
    prepare(
        [config.source],
        config.tokenizer or "gpt2",
        folder,
        val_fraction=config.val_fraction,
        seed=config.val_seed,
        column=config.text,
    )
    return open_prepared(folder, "")


def open_prepared(folder: Path, wanted: str = "") -> Dataset:
    """The data in a prepared folder.

    Args:
        folder: which `prepare` wrote.
        wanted: the tokenizer that has to have made it; "" takes any.

    Raises:
        DataError: another tokenizer made it, or the folder is damaged.
    """
    meta = read_meta(folder)
    name, made = meta["tokenizer"]["name"], meta["tokenizer"]["hash"]
    tokenizer = tokenizers.load(folder / "tokenizer")
    if tokenizer.hash != made:
        raise DataError(
            f"{folder / 'tokenizer'} has the hash {tokenizer.hash}, but the tokens "
            f"were made by {made}. Prepare the text again."
        )
    if (tokenizer.vocab_size, tokenizer.eot) != (meta["vocab_size"], meta["eot"]):
        raise DataError(
            f"{folder / 'meta.json'} has vocab_size={meta['vocab_size']} and "
            f"eot={meta['eot']}, which are not those of {folder / 'tokenizer'}. Copy "
            "the folder again, or prepare the text again."
        )
    asked = identity(wanted) if wanted else made
    if asked not in (made, name):
        raise DataError(
            f"wrong tokenizer for the data: data.tokenizer={wanted!r} ({asked}), but "
            f"{folder} was prepared with {name!r} ({made}). Set data.tokenizer to "
            f'"" to use that one, or prepare the text again.'
        )
    validation = (
        open_tokens(folder, VALIDATION) if VALIDATION in meta["splits"] else None
    )
    named = dataclasses.replace(tokenizer, name=name)
    return Dataset(open_tokens(folder, TRAIN), validation, named)


def preview(folder: Path, n: int = 3, length: int = 100) -> list[str]:
    """Windows of the training tokens, evenly apart, as text."""
    train, _, tokenizer = open_prepared(folder)
    length = min(length, len(train))
    starts = [i * (len(train) - length) // n for i in range(n)]
    return [tokenizer.decode(train.read(start, length)) for start in starts]


def prepare(
    paths: Sequence[str | Path],
    tokenizer: str,
    out: Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    column: str = "",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> DatasetInfo:
    """Text as tokens in the folder `out`, which appears when it is complete.

    The same call again finds its work done. The result does not depend on `workers`.

    Args:
        paths: files, folders, globs, or names of data sets.
        tokenizer: gpt2, bytes, a folder, or bpe:SIZE to learn one from what is not
            held out.
        out: made if it is not there; one that holds anything else is refused.
        val_fraction: of the documents to hold out, at least one; 0 holds out none. A
            single document is cut instead: its end is held out.
        seed: of the choice of documents.
        column: of JSON and CSV rows that holds the text; "" guesses it.
        workers: threads that encode; by default one for each core.
        shard_tokens: in one file.

    Raises:
        DataError: the text cannot be used, or `out` cannot be written.
        ConfigError: a value or the tokenizer makes no sense.
    """
    if not 0 <= val_fraction < 1 or shard_tokens < 1:
        raise ConfigError(
            f"val_fraction={val_fraction} has to be in [0, 1), and "
            f"shard_tokens={shard_tokens} positive. Leave them out, or correct them."
        )
    sources = find_sources(paths, column)
    recipe = {
        "sources": [fingerprint(source) for source in sources],
        "tokenizer": identity(tokenizer),
        "val_fraction": val_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    if is_prepared(out) and (meta := read_meta(out)).get("recipe") == recipe:
        return DatasetInfo(out, meta)
    check_free(out)
    started = time.perf_counter()
    part = out.with_name(f".{out.name}.part-{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir(parents=True)
        meta = write_folder(part, sources, tokenizer, recipe, workers)
        os.replace(part, out)
    except OSError as error:
        raise DataError(
            f"cannot write {out}: {error}. Choose a folder that can be written."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return DatasetInfo(out, meta, time.perf_counter() - started)


def write_folder(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: str,
    recipe: dict[str, Any],
    workers: int | None,
) -> dict[str, Any]:
    """Writes all of a prepared folder; returns its meta.json."""
    division = divide(sources, recipe["val_fraction"], recipe["seed"])
    encoder = make_tokenizer(tokenizer, sources, division)
    encoder.save(folder / "tokenizer")
    splits = write_splits(
        read_parts(sources, division, "encoding"),
        encoder,
        folder,
        recipe["shard_tokens"],
        workers or os.cpu_count() or 1,
    )
    check_splits(splits, recipe["val_fraction"])
    meta = {
        "format": FORMAT,
        "dtype": token_type(encoder.vocab_size).str,
        "tokenizer": {"name": encoder.name, "hash": encoder.hash},
        "vocab_size": encoder.vocab_size,
        "eot": encoder.eot,
        "splits": splits,
        "recipe": recipe,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    return meta


def check_free(out: Path) -> None:
    """Raises when something is there already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"{out} already holds other data, or the same text prepared in another "
            "way. Name another folder, or remove this one."
        )


def identity(name: str) -> str:
    """What tells tokenizers apart: the hash, or bpe:SIZE before one is learned."""
    return name if name.startswith("bpe:") else tokenizers.load(name).hash


def make_tokenizer(
    name: str, sources: Sequence[Source], division: Division
) -> Tokenizer:
    """The named tokenizer; "bpe:SIZE" is learned from what is not held out."""
    if not name.startswith("bpe:"):
        return tokenizers.load(name)
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise ConfigError(
            f"tokenizer {name!r} has no size. Write bpe:2048, for example."
        )
    parts = read_parts(sources, division, "learning tokens")
    texts = (part.text for part in parts if part.split == TRAIN)
    return tokenizers.train(texts, int(size), name)


class Encoded(NamedTuple):
    """What a few parts add to a split."""

    tokens: np.ndarray
    ends: np.ndarray  # after which of the tokens documents end
    bytes: int  # of text


def encode(parts: Sequence[Part], tokenizer: Tokenizer) -> dict[str, Encoded]:
    """The tokens of the parts, by split."""
    dtype = token_type(tokenizer.vocab_size)
    encoded = {}
    for split in SPLITS:
        tokens, ends, count, size = [], [], 0, 0
        start = np.array([tokenizer.eot], dtype)
        for part in parts:
            if part.split == split:
                ids = tokenizer.encode_array(part.text).astype(dtype)
                tokens += [start, ids] if part.first else [ids]
                count += part.first + len(ids)
                size += len(part.text.encode())
                if part.last:
                    ends.append(count)
        whole = np.concatenate([np.empty(0, dtype), *tokens])
        encoded[split] = Encoded(whole, np.array(ends, np.int64), size)
    return encoded


def write_splits(
    parts: Iterable[Part],
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int,
    workers: int,
) -> dict[str, Any]:
    """Writes the shards, and returns what meta.json says about them."""
    dtype = token_type(tokenizer.vocab_size)
    writers = {s: ShardWriter(folder, s, dtype, shard_tokens) for s in SPLITS}
    counts = {s: {"documents": 0, "tokens": 0, "bytes": 0} for s in SPLITS}

    def write(encoded: dict[str, Encoded]) -> None:
        for split, (tokens, ends, size) in encoded.items():
            writers[split].add(tokens, ends)
            counts[split]["documents"] += len(ends)
            counts[split]["tokens"] += len(tokens)
            counts[split]["bytes"] += size

    tokenizer.encode("")  # its tables are built here, not by all threads at once
    # Threads, as tiktoken works outside the interpreter's lock: as fast as processes,
    # which would need a guarded __main__. The queue bounds memory and keeps the order.
    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        for task in tasks(parts):
            queue.append(pool.submit(encode, task, tokenizer))
            if len(queue) > 2 * workers:
                write(queue.popleft().result())
        for future in queue:
            write(future.result())
    splits = {}
    for split, writer in writers.items():
        if counts[split]["documents"]:
            end = Encoded(np.array([tokenizer.eot], dtype), np.empty(0, np.int64), 0)
            write({split: end})
            writer.finish_shard()
            splits[split] = {**counts[split], "shards": writer.shards}
    return splits


def tasks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The parts in lists that are worth a thread's attention."""
    task, size = [], 0
    for part in parts:
        task.append(part)
        size += len(part.text)
        if size >= TASK:
            yield task
            task, size = [], 0
    yield task


def check_splits(splits: dict[str, Any], val_fraction: float) -> None:
    """Raises when a split that was asked for is empty."""
    if not splits:
        raise DataError(
            "there is no text: every file and row is empty. Give files that hold text."
        )
    if TRAIN not in splits or (val_fraction and VALIDATION not in splits):
        raise DataError(
            f"the text is too short to hold out val_fraction={val_fraction} of it. Add "
            "text, or use --val-fraction 0 (data.val_fraction)."
        )
