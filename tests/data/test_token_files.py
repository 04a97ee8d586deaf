"""Tokens are read as they were written, or not at all."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import token_files
from gptjax.data.token_files import (
    TOKEN_FILES_FORMAT,
    ShardWriter,
    find_token_files,
    is_prepared_dir,
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
def test_files_have_the_documented_layout(tmp_path):
    write_prepared(tmp_path, [[1, 2], [3]], 4)

    assert (tmp_path / "train-00000.bin").read_bytes() == bytes([9, 0, 1, 0, 2, 0, 9, 0])
    assert (tmp_path / "train-00001.bin").read_bytes() == bytes([3, 0, 9, 0])
    for vocab_size, size in ((65_536, 2), (65_537, 4)):
        folder = tmp_path / str(size)
        write_prepared(folder, [[vocab_size - 1]], 100, vocab_size)
        assert (folder / "train-00000.bin").stat().st_size == 3 * size
        assert open_split(folder, "train").read(1, 1) == [vocab_size - 1]


def test_a_file_of_another_size_is_rejected_at_opening(tmp_path):
    write_prepared(tmp_path, [[1, 2, 3]] * 3, 5)
    path = tmp_path / "train-00001.bin"

    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=f"{path} has 11 bytes instead of 10"):
        open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=f"{path} has 0 bytes instead of 10"):
        open_split(tmp_path, "train")
    (tmp_path / "train-00000.idx").unlink()
    assert len(verify_prepared(tmp_path)) == 3


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


def test_a_block_is_verified_once(tmp_path, monkeypatch):
    write_prepared(tmp_path, [[1, 2, 3]] * 3, 5)
    tokens, verified, crc32 = open_split(tmp_path, "train"), [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: verified.append(len(data)) or crc32(data))

    for _ in range(3):
        tokens.read(0, 13)

    assert verified == [10, 10, 6]


def test_every_flipped_bit_is_found(tmp_path):
    write_prepared(tmp_path, [[1, 2, 3]] * 3, 5)

    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.idx")]:
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
            )
            assert str(path) in "".join(verify_prepared(tmp_path))
        path.write_bytes(whole)
    assert verify_prepared(tmp_path) == []


SHARD = ("splits", "train", "shards", 0)
INVALID_METADATA = [
    (("dtype",), "<u4"),
    (("dtype",), "object"),
    (("vocab_size",), "10"),
    (("vocab_size",), 9),
    (("eot",), -1),
    (("tokenizer",), {"name": "bytes"}),
    (("splits",), []),
    (("splits", "../x"), {}),
    (("splits", "train"), None),
    (("splits", "train", "shards"), []),
    ((*SHARD, "file"), "/etc/passwd"),
    ((*SHARD, "file"), "../train-00000.bin"),
    ((*SHARD, "file"), "train-00001.bin"),
    ((*SHARD, "tokens"), 0),
    ((*SHARD, "tokens"), 1 << 70),
    ((*SHARD, "documents"), -1),
    ((*SHARD, "documents"), 1 << 40),
    ((*SHARD, "sha256"), ["x"]),
    ((*SHARD, "crc32"), []),
    ((*SHARD, "crc32"), [1, 2]),
    ((*SHARD, "crc32"), [1 << 32]),
    ((*SHARD, "crc32"), ["1"]),
]


def test_invalid_metadata_is_rejected(tmp_path):
    assert not is_prepared_dir(tmp_path)
    path = tmp_path / "meta.json"
    with pytest.raises(DataError, match=f"cannot read {path}"):
        open_split(tmp_path, "train")
    write_prepared(tmp_path, [[1, 2, 3]], 50)
    assert is_prepared_dir(tmp_path)
    text = path.read_text()
    for keys, value in INVALID_METADATA:
        meta = json.loads(text)
        table = meta
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


def open_tokens(folder, split="train"):
    """A split of external files with a vocabulary of 10."""
    return open_external(folder, split, 10, EOT)


def write_llmc(path, tokens, version=1):
    """Writes llm.c's format."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def test_files_of_nanogpt_and_llmc_are_read(tmp_path):
    nanogpt, llmc = tmp_path / "nanogpt", tmp_path / "llmc"
    for folder in (nanogpt, llmc):
        folder.mkdir()
    np.array([1, 2, EOT, 3, EOT], "<u2").tofile(nanogpt / "train.bin")
    np.array([4, EOT], "<u2").tofile(nanogpt / "val.bin")
    write_llmc(llmc / "fineweb_train_000001.bin", [EOT, 1, 2])
    write_llmc(llmc / "fineweb_train_000002.bin", [EOT, 3])
    write_llmc(llmc / "fineweb_val_000000.bin", [EOT, 4])

    assert [path.name for path in find_token_files(nanogpt)] == ["train.bin", "val.bin"]
    assert open_tokens(nanogpt).read(0, 5).tolist() == [1, 2, EOT, 3, EOT]
    assert open_tokens(nanogpt, "validation").read(0, 2).tolist() == [4, EOT]
    assert open_tokens(llmc).read(1, 4).tolist() == [1, 2, EOT, 3]
    assert open_tokens(llmc, "validation").read(0, 2).tolist() == [EOT, 4]
    write_llmc(llmc / "fineweb_train_000002.bin", [EOT, 3], version=7)
    with pytest.raises(DataError, match=r"000002\.bin: .*version 7"):
        open_tokens(llmc)
    for content, value in [
        (b"", r"train\.bin has 0 bytes instead of 1"),
        (b"abc", r"train\.bin has 3 bytes instead of 2"),
        (b"\x09\x00\x0a\x00", r"train\.bin: token 10 at offset 1 .*vocab_size=10"),
    ]:
        (nanogpt / "train.bin").write_bytes(content)
        with pytest.raises(DataError, match=value):
            open_tokens(nanogpt).read(0, 2)
    (nanogpt / "meta.pkl").write_bytes(b"never opened")
    with pytest.raises(DataError, match=r"meta\.pkl"):
        open_tokens(nanogpt)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_files_of_datatrove_are_read(tmp_path, dtype):
    for number in range(2):
        path = tmp_path / f"0000{number}_shuffled.ds"
        np.array([1, 2, EOT, 3, number, EOT], dtype).tofile(path)
        np.array([3, 6], "<u8").tofile(f"{path}.index")
        Path(f"{path}.metadata").write_text("gpt2|2\n6\n6 T")

    assert open_tokens(tmp_path).read(4, 8).tolist() == [0, EOT, 1, 2, EOT, 3, 1, EOT]
    assert open_tokens(tmp_path, "validation") is None
    for ends, value in (([2, 6], "token 2"), ([2, 5], " is 5"), ([], " is 0")):
        np.array(ends, "<u8").tofile(f"{path}.index")
        with pytest.raises(DataError, match=rf"00001_shuffled\.ds.*{value}"):
            open_tokens(tmp_path)
