"""Tokenizes text into a prepared folder; opens the data that a config names."""

import dataclasses
import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.datasets import DATASETS, PYTHON_HELP
from gptjax.data.readers import describe_unread
from gptjax.data.text import (
    TEXT_SPLITS,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    SplitRule,
    SplitSpan,
    TextSource,
    file_state,
    find_sources,
    iter_split_spans,
    make_split_rule,
    source_fingerprint,
)
from gptjax.data.token_files import (
    MAX_TOKEN_METADATA_BYTES,
    REPREPARE_ADVICE,
    SOURCES_FILE,
    SPLIT_OPTIONS,
    TOKEN_FILES_FORMAT,
    ShardWriter,
    TokenDataset,
    is_prepared_dir,
    open_external,
    open_split,
    read_token_metadata,
    token_dtype,
)
from gptjax.errors import ConfigError, DataError
from gptjax.fileio.atomic import atomic_path, write_atomic
from gptjax.fileio.paths import user_path
from gptjax.runtime.preemption import heartbeat
from gptjax.runtime.timing import log_progress
from gptjax.tokenizer.tokenizer import (
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    untrained_vocab_size,
)

DEFAULT_SHARD_TOKENS = 100_000_000
TASK_CHARS = 1 << 17  # characters per encoding task, approximately
MAX_LISTED_FILES = 5  # in a summary


class TokenizedSplits(NamedTuple):
    """Token streams of both splits, with their tokenizer."""

    train: TokenDataset
    validation: TokenDataset | None
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Content of a prepared folder; `str` gives a readable summary."""

    folder: Path
    meta: dict[str, Any]
    sources: tuple[TextSource, ...]

    def __str__(self) -> str:
        count = len(self.sources)
        title = f"{count:,} files, the first of which are" if count > MAX_LISTED_FILES else ""
        lines = [f"{self.folder}: {self.meta['tokenizer']['name']} tokens of {title}".rstrip()]
        for source in self.sources[:MAX_LISTED_FILES]:
            column = f", column {source.column!r}" if source.column else ""
            lines.append(f"  {source.path.name}{column}")
        for split, entry in self.meta["splits"].items():
            lines.append(
                f"{split:<11}{entry['documents']:>12,} documents"
                f"{entry['tokens']:>16,} tokens"
                f"{entry['bytes'] / entry['tokens']:>8.3f} bytes per token"
            )
        lines += [self.meta["unread"].removeprefix("; ")] * bool(self.meta.get("unread"))
        return "\n".join(lines)


def open_dataset(config: DataConfig, prepared_dir: Path) -> TokenizedSplits:
    """Opens the tokens that a config names, preparing them first if necessary.

    Tokens of a text are prepared in `prepared_dir`, which is reused if it has the same
    content.
    """
    source = user_path(config.source)
    is_prepared = is_prepared_dir(source)
    is_external = config.source not in (PYTHON_HELP, *DATASETS) and any(source.glob("*.ds"))
    for name in SPLIT_OPTIONS if is_prepared or is_external else ():
        if (value := getattr(config, name)) != getattr(DataConfig(), name):
            raise ConfigError(
                f"data.{name}={value!r} has no effect, since {source} is already tokenized and "
                "split. Remove the option."
            )
    if is_prepared:
        return open_prepared(source, config.tokenizer)
    if is_external:
        tokenizer = load_tokenizer(config.tokenizer or "gpt2")
        options = tokenizer.vocab_size, tokenizer.eot_token
        train, validation = (open_external(source, split, *options) for split in TEXT_SPLITS)
        if train is None:
            raise DataError(f"{source} has validation tokens only. Add a training file.")
        return TokenizedSplits(train, validation, tokenizer)
    prepare_dataset(
        [config.source],
        config.tokenizer or "gpt2",
        prepared_dir,
        val_fraction=config.val_fraction,
        seed=config.split_seed,
        column=config.text_column,
    )
    return open_prepared(prepared_dir, "")


def open_prepared(folder: Path, expected_tokenizer: str = "") -> TokenizedSplits:
    """Opens a folder written by `prepare_dataset`; `expected_tokenizer` "" is any."""
    meta = read_token_metadata(folder)
    name, tokenizer_hash = meta["tokenizer"]["name"], meta["tokenizer"]["hash"]
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = (tokenizer.hash, tokenizer.vocab_size, tokenizer.eot_token)
    if found != (expected := (tokenizer_hash, meta["vocab_size"], meta["eot"])):
        raise DataError(
            f"{folder / 'tokenizer'} has (hash, vocab_size, eot) = {found}, but the data was "
            f"prepared with {expected}. {REPREPARE_ADVICE}"
        )
    expected_id = tokenizer_id(expected_tokenizer) if expected_tokenizer else tokenizer_hash
    if expected_id not in (tokenizer_hash, name):
        raise DataError(
            f"data.tokenizer={expected_tokenizer!r} ({expected_id}) does not match "
            f"{folder}, which was prepared with {name!r} ({tokenizer_hash}). Set "
            'data.tokenizer to "" to use that one, or prepare the text again.'
        )
    has_validation = VALIDATION_SPLIT in meta["splits"]
    validation = open_split(folder, VALIDATION_SPLIT) if has_validation else None
    tokenizer = dataclasses.replace(tokenizer, name=name)
    return TokenizedSplits(open_split(folder, TRAIN_SPLIT), validation, tokenizer)


def sample_windows(folder: Path, n: int = 3, length: int = 100) -> list[str]:
    """Decodes `n` evenly spaced windows of the training tokens."""
    train, _, tokenizer = open_prepared(folder)
    length = min(length, len(train))
    starts = [i * (len(train) - length) // n for i in range(n)]
    return [tokenizer.decode(train.read(start, length)) for start in starts]


def prepare_dataset(
    paths: Sequence[str | Path],
    tokenizer: str,
    out: Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    column: str = "",
    workers: int | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
) -> DatasetInfo:
    """Tokenizes text into the folder `out`; does nothing if it holds the result.

    While another process prepares the same folder, this waits for its result.
    `paths` are files, folders, globs or names of data sets; `tokenizer` is gpt2, bytes,
    a folder, or bpe:SIZE to train one. At least one document is held out unless
    `val_fraction` is 0; of a single document, the end is. `column` is that of the text;
    "" guesses it. The number of `workers` (threads) has no effect on the result.
    """
    if not 0 <= val_fraction < 1 or shard_tokens < 1:
        raise ConfigError(
            f"val_fraction={val_fraction} must be in [0, 1), and "
            f"shard_tokens={shard_tokens} must be positive."
        )
    sources = find_sources(paths, column)
    states = [file_state(source.path) for source in sources]
    tracked = log_progress(sources, len(sources), "hashing", "files")
    source_lines = "".join(json.dumps(source_fingerprint(x)) + "\n" for x in tracked)
    recipe = {
        "sources": hashlib.sha256(source_lines.encode()).hexdigest(),
        "tokenizer": tokenizer_id(tokenizer),
        "val_fraction": val_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    if meta := read_prepared(out, recipe):
        return DatasetInfo(out, meta, tuple(sources))
    try:
        with atomic_path(out, wait=True) as new_dir:
            meta = read_prepared(out, recipe)  # of a process that this one waited for
            if not meta:
                new_dir.mkdir()
                (new_dir / SOURCES_FILE).write_text(source_lines)
                meta = write_prepared(new_dir, sources, tokenizer, recipe, workers)
                check_unchanged(sources, states)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}. Choose a writable folder.") from error
    return DatasetInfo(out, meta, tuple(sources))


def read_prepared(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Reads the meta.json of a folder with this recipe; {} if it has no content."""
    meta = read_token_metadata(folder) if is_prepared_dir(folder) else {}
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if meta.get("recipe") != recipe and folder.exists() and not is_empty:
        raise DataError(
            f"{folder} already holds other data, or the same text prepared with other "
            "options. Choose another folder, or remove this one."
        )
    return meta


def check_unchanged(sources: Sequence[TextSource], states: Sequence[Any]) -> None:
    """Raises a DataError unless the files still have these `file_state`s."""
    for source, state in zip(sources, states, strict=True):
        if file_state(source.path) != state:
            raise DataError(
                f"{source.path} changed while it was prepared, so its tokens were discarded. "
                "Run the command again when nothing writes to the file."
            )


def write_prepared(
    folder: Path,
    sources: Sequence[TextSource],
    tokenizer_name: str,
    recipe: dict[str, Any],
    workers: int | None,
) -> dict[str, Any]:
    """Writes a prepared folder; returns the content of its meta.json."""
    val_fraction = recipe["val_fraction"]
    rule = make_split_rule(sources, val_fraction, recipe["seed"])
    tokenizer = load_or_train_tokenizer(tokenizer_name, sources, rule)
    tokenizer.save(folder / "tokenizer")
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {s: ShardWriter(folder, s, dtype, recipe["shard_tokens"]) for s in TEXT_SPLITS}
    unread = Counter[str]()
    spans = iter_split_spans(sources, rule, "encoding", unread)

    def write(encoded: dict[str, EncodedSpans]) -> None:
        for split, part in encoded.items():
            writers[split].append(*part)

    with ThreadPoolExecutor(1, "write") as pool:  # writes and hashes while others are encoded
        pending = pool.submit(write, {})
        for encoded in encode_spans(spans, tokenizer, workers or os.cpu_count() or 1):
            heartbeat()
            pending.result()
            pending = pool.submit(write, encoded)
        pending.result()
    splits = {}
    for split, writer in writers.items():
        if writer.counts["documents"]:
            writer.append(np.array([tokenizer.eot_token], dtype), np.empty(0, np.int64), 0)
            splits[split] = writer.finish()
        elif split == TRAIN_SPLIT or val_fraction:
            raise DataError(
                f"the text is empty, or too short for val_fraction={val_fraction}. Add text, "
                "or set --val-fraction 0 (data.val_fraction)."
            )
    meta = {
        "format": TOKEN_FILES_FORMAT,
        "dtype": dtype.str,
        "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash},
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot_token,
        "splits": splits,
        "unread": describe_unread(unread),
        "recipe": recipe,
    }
    write_atomic(folder / "meta.json", json.dumps(meta, indent=1), MAX_TOKEN_METADATA_BYTES)
    return meta


def tokenizer_id(name: str) -> str:
    """Returns the hash of a tokenizer, or bpe:SIZE if it is yet to be trained."""
    return name if untrained_vocab_size(name) else load_tokenizer(name).hash


def load_or_train_tokenizer(name: str, sources: Sequence[TextSource], rule: SplitRule) -> Tokenizer:
    """Loads a tokenizer, or trains "bpe:SIZE" on the training split."""
    if not (size := untrained_vocab_size(name)):
        return load_tokenizer(name)
    spans = iter_split_spans(sources, rule, "learning tokens")
    texts = (span.text for span in spans if span.split == TRAIN_SPLIT)
    return train_tokenizer(texts, size, name)


# Tokens of a split, their number up to each end of a document, bytes of text.
EncodedSpans = tuple[np.ndarray, np.ndarray, int]


def encode_batch(spans: Sequence[SplitSpan], tokenizer: Tokenizer) -> dict[str, EncodedSpans]:
    """Encodes spans of text; returns the tokens by split."""
    dtype, encoded = token_dtype(tokenizer.vocab_size), {}
    start = np.array([tokenizer.eot_token, *tokenizer.prefix_ids], dtype)
    for split in TEXT_SPLITS:
        part = [span for span in spans if span.split == split]
        tokens, lengths = [start[:0]], []
        for span in part:
            parts = [start] * span.is_first + [tokenizer.encode_array(span.text)]
            tokens += parts
            lengths.append(sum(map(len, parts)))
        ends = np.cumsum(lengths, dtype=np.int64)
        num_bytes = sum(len(span.text.encode()) for span in part)
        is_end = [span.is_last for span in part]
        stream = np.concatenate(tokens, dtype=dtype, casting="unsafe")
        encoded[split] = stream, ends[is_end], num_bytes
    return encoded


def encode_spans(
    spans: Iterable[SplitSpan], tokenizer: Tokenizer, workers: int
) -> Iterator[dict[str, EncodedSpans]]:
    """Encodes spans in threads; yields the tokens of batches by split, in order."""
    if tokenizer.is_bytewise:  # as fast as reading
        yield from (encode_batch(batch, tokenizer) for batch in batch_spans(spans))
        return
    tokenizer.encode("")  # builds its tables before the threads start
    # tiktoken releases the GIL, so threads are as fast as processes. The queue bounds
    # memory and keeps the order.
    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        for batch in batch_spans(spans):
            queue.append(pool.submit(encode_batch, batch, tokenizer))
            if len(queue) > 2 * workers:
                yield queue.popleft().result()
        for future in queue:
            yield future.result()


def batch_spans(spans: Iterable[SplitSpan]) -> Iterator[list[SplitSpan]]:
    """Groups spans into tasks large enough for a thread."""
    batch, size = [], 0
    for span in spans:
        batch.append(span)
        size += len(span.text)
        if size >= TASK_CHARS:
            yield batch
            batch, size = [], 0
    yield batch
