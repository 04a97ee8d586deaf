"""Tokens come back from disk as they were written, or not at all."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import token_files
from gptjax.data.token_files import (
    TOKEN_FILES_FORMAT,
    ShardWriter,
    TokenDataset,
    find_token_files,
    is_prepared_dir,
    open_external,
    open_split,
    token_dtype,
    verify_prepared,
)
from gptjax.errors import DataError

EOT = 9


def write(folder: Path, chunks: list[list[int]], length: int, vocab_size: int = 10):
    """A prepared folder of these tokens, an EOT in front of each document."""
    folder.mkdir(exist_ok=True)
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder, "train", dtype, length)
    for chunk in chunks:
        tokens = np.array([EOT, *chunk], dtype)
        writer.append(tokens, np.array([len(tokens)]))
    writer.append(np.array([EOT], dtype), np.empty(0, int))
    writer.finish_shard()
    meta = {"format": TOKEN_FILES_FORMAT, "dtype": dtype.str, "vocab_size": vocab_size, "eot": EOT}
    meta["tokenizer"] = {"name": "none", "hash": "none"}
    counts = dict.fromkeys(("documents", "tokens", "bytes"), 1)
    meta["splits"] = {"train": {**counts, "shards": writer.shards}}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A counter of new folders, as hypothesis runs many examples in one test."""
    return (tmp_path_factory.mktemp("shards") for _ in iter(int, 1))


@pytest.mark.fast
@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=5), st.integers(1, 20))
def test_any_window_is_read_across_shards(scratch, documents, length):
    folder = next(scratch)
    write(folder, documents, length)
    stream = [t for document in documents for t in (EOT, *document)] + [EOT]

    tokens = open_split(folder, "train")

    assert len(tokens) == len(stream)
    assert [shard.tokens for shard in tokens.shards[:-1]] == [length] * (len(tokens.shards) - 1)
    for start in range(len(stream)):
        for stop in range(start, len(stream) + 1):
            found = tokens.read(start, stop - start)
            assert found.dtype == np.int32
            assert found.tolist() == stream[start:stop]
    assert tokens.documents == len(documents)
    for number, document in enumerate(documents):
        start, stop = tokens.document_range(number)
        assert stream[start:stop] == [EOT, *document]
    assert verify_prepared(folder) == []


@pytest.mark.fast
def test_ids_take_two_bytes_up_to_65536_types(tmp_path):
    for vocab_size, size in ((65_536, 2), (65_537, 4)):
        folder = tmp_path / str(size)
        write(folder, [[vocab_size - 1]], 100, vocab_size)

        assert (folder / "train-00000.bin").stat().st_size == 3 * size
        assert open_split(folder, "train").read(1, 1) == [vocab_size - 1]


def test_the_files_are_little_endian_and_end_as_documented(tmp_path):
    write(tmp_path, [[1, 2], [3]], 4)

    assert (tmp_path / "train-00000.bin").read_bytes() == bytes([9, 0, 1, 0, 2, 0, 9, 0])
    assert (tmp_path / "train-00001.bin").read_bytes() == bytes([3, 0, 9, 0])
    assert np.fromfile(tmp_path / "train-00000.idx", "<u8").tolist() == [3]
    assert np.fromfile(tmp_path / "train-00001.idx", "<u8").tolist() == [1]


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx"])
def test_a_file_of_another_size_is_refused_when_it_is_opened(tmp_path, name):
    write(tmp_path, [[1, 2, 3]] * 3, 5)
    path = tmp_path / name
    size = path.stat().st_size

    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=rf"{name} has {size + 1} bytes instead of {size}"):
        open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} has 0 bytes instead of {size}"):
        open_split(tmp_path, "train")
    assert len(verify_prepared(tmp_path)) == 2


@pytest.mark.fast
def test_a_damaged_block_is_refused_when_it_is_read_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "CRC_BLOCK_BYTES", 4)  # two tokens
    write(tmp_path, [[1, 2, 3]] * 3, 5)
    data = np.memmap(tmp_path / "train-00001.bin", "<u2", "r+")
    data[2] = 4
    data.flush()
    tokens = open_split(tmp_path, "train")

    assert tokens.read(0, 7).max() == 9  # up to the block
    assert tokens.read(9, 4).tolist() == [1, 2, 3, 9]  # from behind it
    message = r"train-00001\.bin: block 1, bytes 4 to 7, has CRC-32 [0-9a-f]{8}, "
    for start, count in ((7, 1), (8, 1), (0, 13), (7, 2)):
        with pytest.raises(DataError, match=message):
            tokens.read(start, count)
    hash_problem, block_problem = verify_prepared(tmp_path)
    assert "train-00001.bin: sha256 " in hash_problem
    assert "block 1, bytes 4 to 7" in block_problem


def test_a_block_is_compared_once(tmp_path, monkeypatch):
    write(tmp_path, [[1, 2, 3]] * 3, 5)
    tokens, compared, crc32 = open_split(tmp_path, "train"), [], zlib.crc32

    def counted(data):
        compared.append(len(data))
        return crc32(data)

    monkeypatch.setattr(zlib, "crc32", counted)

    for _ in range(3):
        tokens.read(0, 13)

    assert compared == [10, 10, 6]


def test_an_index_that_is_not_the_one_written_is_refused(tmp_path):
    write(tmp_path, [[1, 2, 3]] * 3, 50)
    (tmp_path / "train-00000.idx").write_bytes(bytes(24))

    with pytest.raises(DataError, match=r"00000\.idx: block 0, bytes 0 to 23, .*SHA-256"):
        open_split(tmp_path, "train")


def change(table, path, value):
    """Sets what lies at the end of a path of keys."""
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value


SHARD = ("splits", "train", "shards", 0)
STRANGE = [
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


@pytest.mark.parametrize(("path", "value"), STRANGE, ids=str)
def test_a_description_of_what_cannot_be_is_refused(tmp_path, path, value):
    write(tmp_path, [[1, 2, 3]], 50)
    meta = json.loads((tmp_path / "meta.json").read_text())
    change(meta, path, value)
    (tmp_path / "meta.json").write_text(json.dumps(meta))

    with pytest.raises(DataError, match=r"meta\.json is not valid metadata"):
        open_split(tmp_path, "train")


def test_every_flipped_bit_is_found(tmp_path):
    write(tmp_path, [[1, 2, 3]] * 3, 5)

    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.idx")]:
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert str(path) in "".join(verify_prepared(tmp_path))
        path.write_bytes(whole)
    assert verify_prepared(tmp_path) == []


def test_only_a_finished_folder_of_this_version_is_opened(tmp_path):
    assert not is_prepared_dir(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*meta\.json.*Give a folder"):
        open_split(tmp_path, "train")
    write(tmp_path, [[1]], 5)
    assert is_prepared_dir(tmp_path)
    with pytest.raises(DataError, match=r"no split 'validation', only train. Prepare"):
        open_split(tmp_path, "validation")
    meta = tmp_path / "meta.json"
    meta.write_text(meta.read_text().replace(TOKEN_FILES_FORMAT, "gptjax tokens 9"))
    with pytest.raises(DataError, match="has the format 'gptjax tokens 9', expected 'gptja"):
        open_split(tmp_path, "train")


def opened(folder: Path, split: str = "train") -> TokenDataset:
    """The foreign split, in a vocabulary of 10."""
    tokens = open_external(folder, split, 10, EOT)
    assert tokens is not None
    return tokens


def test_nanogpts_files_are_read(tmp_path):
    np.array([1, 2, EOT, 3, EOT], "<u2").tofile(tmp_path / "train.bin")
    np.array([4, EOT], "<u2").tofile(tmp_path / "val.bin")

    assert [path.name for path in find_token_files(tmp_path)] == ["train.bin", "val.bin"]
    assert opened(tmp_path).read(0, 5).tolist() == [1, 2, EOT, 3, EOT]
    assert opened(tmp_path, "validation").read(0, 2).tolist() == [4, EOT]


def llmc(path: Path, tokens: list[int], version: int = 1) -> None:
    """Writes llm.c's format."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def test_llmcs_files_are_read(tmp_path):
    llmc(tmp_path / "fineweb_train_000001.bin", [EOT, 1, 2])
    llmc(tmp_path / "fineweb_train_000002.bin", [EOT, 3])
    llmc(tmp_path / "fineweb_val_000000.bin", [EOT, 4])

    assert opened(tmp_path).read(1, 4).tolist() == [1, 2, EOT, 3]
    assert opened(tmp_path, "validation").read(0, 2).tolist() == [EOT, 4]
    llmc(tmp_path / "fineweb_train_000002.bin", [EOT, 3], version=7)
    with pytest.raises(DataError, match=r"000002.bin: llm.c format version 7; only"):
        opened(tmp_path)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_datatroves_files_are_read(tmp_path, dtype):
    for number in range(2):
        path = tmp_path / f"0000{number}_shuffled.ds"
        np.array([1, 2, EOT, 3, number, EOT], dtype).tofile(path)
        np.array([3, 6], "<u8").tofile(f"{path}.index")
        Path(f"{path}.metadata").write_text("gpt2|2\n6\n6 T")

    tokens = opened(tmp_path)

    assert tokens.read(4, 8).tolist() == [0, EOT, 1, 2, EOT, 3, 1, EOT]
    assert tokens.documents == 4
    assert tokens.document_range(3) == (9, 12)
    assert open_external(tmp_path, "validation", 10, EOT) is None


def test_foreign_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "train.bin"
    for content, message in [
        (b"", r"train\.bin has 0 bytes instead of 1"),
        (b"abc", r"train\.bin has 3 bytes instead of 2"),
        (b"\x09\x00\x0a\x00", None),
    ]:
        path.write_bytes(content)
        if message:
            with pytest.raises(DataError, match=message):
                opened(tmp_path)
    with pytest.raises(DataError, match=r"train\.bin: token 10 at offset 1 is out of"):
        opened(tmp_path).read(0, 2)
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    with pytest.raises(DataError, match=r"meta\.pkl; gptjax does not load pickles"):
        opened(tmp_path)


def test_datatrove_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "0.ds"
    np.array([1, 2, 3, 4], "<u2").tofile(path)

    with pytest.raises(DataError, match=r"0\.ds has 8 bytes, but .* 0\.ds\.index is 0"):
        opened(tmp_path)
    np.array([2, 5], "<u8").tofile(tmp_path / "0.ds.index")
    with pytest.raises(DataError, match=r"0\.ds\.index is 5, .*Copy both files again"):
        opened(tmp_path)
    np.array([2, 4], "<u8").tofile(tmp_path / "0.ds.index")
    with pytest.raises(DataError, match="first document ends with token 2, not with the"):
        opened(tmp_path)
