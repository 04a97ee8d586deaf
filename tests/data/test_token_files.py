"""Tokens are read as they were written, or not at all."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import token_files
from gptjax.data.token_files import (
    TOKEN_FILES_FORMAT,
    ShardWriter,
    open_external,
    open_split,
    token_dtype,
    verify_prepared,
)
from gptjax.errors import DataError
from tests.data.tables import quick

EOT = 9


def write_prepared(folder, documents, shard_tokens, vocab_size=10):
    """A prepared folder of these documents; returns its stream of tokens."""
    folder.mkdir(exist_ok=True)
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder, "train", dtype, shard_tokens)
    for document in documents:
        writer.append(np.array([EOT, *document], dtype), np.array([1 + len(document)]), 1)
    writer.append(np.array([EOT], dtype), np.empty(0, int), 0)
    meta = {"format": TOKEN_FILES_FORMAT, "dtype": dtype.str, "vocab_size": vocab_size, "eot": EOT}
    meta["tokenizer"] = {"name": "none", "hash": "none"}
    meta["splits"] = {"train": writer.finish()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return [t for document in documents for t in (EOT, *document)] + [EOT]


@pytest.mark.fast
@quick
@given(st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=5), st.integers(1, 20))
def test_any_range_is_read_across_shards(tmp_path, documents, shard_tokens):
    for path in tmp_path.glob("t*"):
        path.unlink()
    stream = write_prepared(tmp_path, documents, shard_tokens)

    tokens = open_split(tmp_path, "train")

    assert len(tokens) == len(stream)
    assert all(shard.tokens == shard_tokens for shard in tokens.shards[:-1])
    for start in range(len(stream)):
        for stop in (start, start + 1, len(stream)):
            found = tokens.read(start, stop - start)
            assert found.dtype == np.int32
            assert found.tolist() == stream[start:stop]
    # The index has the ends of the documents.
    ends = [
        offset + end
        for shard, offset in zip(tokens.shards, tokens.shard_offsets, strict=False)
        for end in np.fromfile(shard.path.with_suffix(".idx"), "<u8").tolist()
    ]
    assert ends == np.cumsum([1 + len(document) for document in documents]).tolist()
    assert verify_prepared(tmp_path) == []


@pytest.mark.fast
def test_tokens_are_stored_in_the_smallest_type(tmp_path):
    for vocab_size, size in ((65_536, 2), (65_537, 4)):
        write_prepared(tmp_path, [[vocab_size - 1]], 2, vocab_size)

        whole = np.array([EOT, vocab_size - 1, EOT], f"<u{size}").tobytes()
        files = sorted(tmp_path.glob("*.bin"))
        assert b"".join(path.read_bytes() for path in files) == whole
        assert open_split(tmp_path, "train").read(1, 1) == [vocab_size - 1]
        for path in files:
            path.unlink()


@pytest.mark.fast
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
    hash_problem, block_problem = verify_prepared(tmp_path)
    assert "train-00001.bin: sha256 " in hash_problem
    assert "block 1, bytes 4 to 7" in block_problem
    assert [verified.tolist() for verified in tokens.verified_blocks] == [
        *([True] * 3, [True, False, True], [True] * 2)
    ]


def test_damaged_and_missing_files_are_found(tmp_path):
    write_prepared(tmp_path, [[1, 2, 3]] * 3, 5)

    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.idx")]:
        whole = path.read_bytes()
        for n, byte in enumerate(whole):
            path.write_bytes(whole[:n] + bytes([byte ^ 1]) + whole[n + 1 :])
            assert str(path) in "".join(verify_prepared(tmp_path))
        path.unlink()
        assert f"{path}: sha256 missing" in "".join(verify_prepared(tmp_path))
        path.write_bytes(whole)
    path = tmp_path / "train-00001.bin"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=f"{path} has 11 bytes instead of 10"):
        open_split(tmp_path, "train")


SHARD = ("splits", "train", "shards", 0)
INVALID_METADATA = [
    (("dtype",), "<u4"),
    (("vocab_size",), 9),
    (("eot",), -1),
    (("tokenizer",), {"name": "bytes"}),
    (("splits", "../x"), {}),
    ((*SHARD, "file"), "../train-00000.bin"),
    ((*SHARD, "tokens"), 0),
    ((*SHARD, "documents"), 1 << 40),
    ((*SHARD, "sha256"), ["x"]),
    ((*SHARD, "crc32"), []),
    ((*SHARD, "crc32"), ["1"]),
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
        with pytest.raises(DataError, match=f"{path} is not valid"):
            open_split(tmp_path, "train")
    path.write_text(text.replace(TOKEN_FILES_FORMAT, "gptjax tokens 9"))
    with pytest.raises(DataError, match="'gptjax tokens 9'"):
        open_split(tmp_path, "train")
    path.write_text(text)
    with pytest.raises(DataError, match=r"'validation'.*--val-fraction"):
        open_split(tmp_path, "validation")


def read_all(folder, split):
    """All tokens of one split of external files with a vocabulary of 10."""
    tokens = open_external(folder, split, 10, EOT)
    return tokens and tokens.read(0, len(tokens)).tolist()


def write_llmc(path, tokens, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def test_files_of_nanogpt_and_llmc_are_read(tmp_path):
    path = tmp_path / "fineweb_train_000002.bin"
    np.array([1, 2, EOT, 3, EOT], "<u2").tofile(tmp_path / "a_train.bin")
    write_llmc(tmp_path / "fineweb_train_000001.bin", [EOT, 1, 2])
    write_llmc(path, [EOT, 3])
    write_llmc(tmp_path / "fineweb_val_000000.bin", [EOT, 4])

    assert read_all(tmp_path, "train") == [1, 2, EOT, 3, EOT, EOT, 1, 2, EOT, 3]
    assert read_all(tmp_path, "validation") == [EOT, 4]
    write_llmc(path, [EOT, 3], version=7)
    with pytest.raises(DataError, match=f"{path}: .*version 7"):
        read_all(tmp_path, "train")
    for content, value in [
        (b"", " has 0 bytes instead of 1"),
        (b"abc", " has 3 bytes instead of 2"),
        (b"\x09\x00\x0a\x00", r": token 10 at offset 1 .*vocab_size=10"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}{value}"):
            read_all(tmp_path, "train")
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    with pytest.raises(DataError, match=r"meta\.pkl"):
        read_all(tmp_path, "train")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_files_of_datatrove_are_read(tmp_path, dtype):
    for number in range(2):
        path = tmp_path / f"0000{number}_shuffled.ds"
        np.array([1, 2, EOT, 3, number, EOT], dtype).tofile(path)
        np.array([3, 6], "<u8").tofile(f"{path}.index")

    assert read_all(tmp_path, "train") == [1, 2, EOT, 3, 0, EOT, 1, 2, EOT, 3, 1, EOT]
    assert read_all(tmp_path, "validation") is None
    for ends, value in (([2, 6], "token 2"), ([2, 5], " is 5"), ([], " is 0")):
        np.array(ends, "<u8").tofile(f"{path}.index")
        with pytest.raises(DataError, match=rf"00001_shuffled\.ds.*{value}"):
            read_all(tmp_path, "train")
