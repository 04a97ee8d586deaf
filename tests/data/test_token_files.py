"""Tokens are read as they were written, or not at all."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import token_files
from gptjax.data.prepare import open_dataset
from gptjax.data.token_files import ShardWriter, open_split, token_dtype, verify_prepared
from gptjax.errors import DataError
from tests.data.tables import quick

EOT = 9


def write_prepared(folder, documents, shard_tokens, vocab_size=10):
    """A prepared folder of these documents; returns its stream of tokens."""
    for path in folder.glob("train-*"):
        path.unlink()
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder, "train", dtype, shard_tokens)
    for document in documents:
        writer.append(np.array([EOT, *document], dtype), np.array([1 + len(document)]), 1)
    writer.append(np.array([EOT], dtype), np.empty(0, int), 0)
    meta = {"format": token_files.TOKEN_FILES_FORMAT, "dtype": dtype.str, "eot": EOT}
    meta |= {"vocab_size": vocab_size, "tokenizer": {"name": "none", "hash": "none"}}
    meta["splits"] = {"train": writer.finish()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return [t for document in documents for t in (EOT, *document)] + [EOT]


@quick
@given(
    st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=5),
    st.integers(1, 20),
    st.sampled_from([10, 65_536, 65_537]),
)
def test_any_range_is_read_across_shards(tmp_path, documents, shard_tokens, vocab_size):
    documents = [[*document, vocab_size - 1] for document in documents]
    stream = write_prepared(tmp_path, documents, shard_tokens, vocab_size)

    tokens = open_split(tmp_path, "train")

    assert len(tokens) == len(stream)
    assert all(len(shard.tokens) == shard_tokens for shard in tokens.shards[:-1])
    dtype = "<u2" if vocab_size <= 65_536 else "<u4"  # the smallest type
    content = b"".join(shard.path.read_bytes() for shard in tokens.shards)
    assert content == np.array(stream, dtype).tobytes()
    for start in range(len(stream)):
        for stop in (start, start + 1, len(stream)):
            found = tokens.read(start, stop - start)
            assert (found.dtype, found.tolist()) == (np.int32, stream[start:stop])
    ends = []  # of the documents
    for shard, offset in zip(tokens.shards, tokens.shard_offsets, strict=False):
        ends += (offset + np.fromfile(shard.path.with_suffix(".idx"), "<i8")).tolist()
    assert ends == np.cumsum([1 + len(document) for document in documents]).tolist()
    assert verify_prepared(tmp_path) == []


def test_a_corrupt_block_is_rejected_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "CRC_BLOCK_BYTES", 4)  # two tokens
    write_prepared(tmp_path, [[1, 2, 3]] * 3, 5)
    data = np.memmap(tmp_path / "train-00001.bin", "<u2", "r+")
    data[2] = 4
    data.flush()
    tokens = open_split(tmp_path, "train")

    assert tokens.read(0, 7).max() == 9  # up to the block
    assert tokens.read(9, 4).tolist() == [1, 2, 3, 9]  # from behind it
    for start, count in ((7, 1), (8, 1), (0, 13), (7, 2)):
        with pytest.raises(DataError, match=r"train-00001\.bin: block 1, bytes 4 to 7, "):
            tokens.read(start, count)


def test_damaged_and_missing_files_are_found(tmp_path):
    write_prepared(tmp_path, [[1, 2, 3]] * 3, 5)

    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.idx")]:
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], whole + b"\0", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert str(path) in "".join(verify_prepared(tmp_path))
        os.mkfifo(path)
        assert str(path) in "".join(verify_prepared(tmp_path))
        path.unlink()
        path.write_bytes(whole)


SHARD = ("splits", "train", "shards", 0)
INVALID_METADATA = [
    (("dtype",), "<u4"),
    (("eot",), -1),
    (("tokenizer",), {"name": "bytes"}),
    (("splits", "../x"), {}),
    ((*SHARD, "file"), "../train-00000.bin"),
    ((*SHARD, "tokens"), 0),
    ((*SHARD, "crc32"), []),
    (("format",), "gptjax tokens 9"),
]


def test_invalid_metadata_is_rejected(tmp_path):
    path = tmp_path / "meta.json"
    with pytest.raises(DataError, match=f"cannot read {path}"):
        open_split(tmp_path, "train")
    write_prepared(tmp_path, [[1, 2, 3]], 50)
    text = path.read_text()
    for keys, value in INVALID_METADATA:
        meta = table = json.loads(text)
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value
        path.write_text(json.dumps(meta))
        with pytest.raises(DataError, match=rf"{path} (is not valid|.*'gptjax tokens 9')"):
            open_split(tmp_path, "train")
    path.write_text(text)
    with pytest.raises(DataError, match=r"'validation'.*--val-fraction"):
        open_split(tmp_path, "validation")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_files_of_datatrove_are_opened_with_the_configured_tokenizer(tmp_path, dtype):
    config, stream = DataConfig(source=str(tmp_path), tokenizer="bytes"), [1, 2, 256, 3, 256]
    for name in ("val.ds", "00001.ds", "00000.ds"):
        np.array(stream, dtype).tofile(tmp_path / name)
        np.array([3, 5], "<u8").tofile(tmp_path / f"{name}.index")

    train, validation, tokenizer = open_dataset(config, tmp_path / "run")

    assert (train.read(0, 10).tolist(), validation.read(0, 5).tolist()) == (stream * 2, stream)
    assert (len(train), train.eot, train.vocab_size) == (10, 256, tokenizer.vocab_size)
    np.array([2, 5], "<u8").tofile(tmp_path / "00001.ds.index")
    with pytest.raises(DataError, match=r"00001\.ds.*token 2"):
        open_dataset(config, tmp_path / "run")
