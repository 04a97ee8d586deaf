"""OpenAI's checkpoints are read bit for bit, or not at all."""

import shutil
import tracemalloc

import numpy as np
import pytest

from gptjax.errors import ModelError
from gptjax.weights.tf_checkpoint import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_BYTES,
    MAX_INDEX_ENTRIES,
    MAX_TF_AXES,
    open_tf_checkpoint,
)
from tests.build_openai_fixture import FOLDER, arrays
from tests.tensor_bundle import (
    HEADER,
    RESTARTS,
    entry,
    folder_of,
    index_of,
    pair,
    proto,
    shape,
    table,
    varint,
)

DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture
def tiny(tmp_path):
    """A copy of TensorFlow's checkpoint, to be damaged."""
    return shutil.copytree(FOLDER, tmp_path / "tiny")


def read_all(folder):
    """The tensors by name, or None if the checkpoint is rejected."""
    try:
        checkpoint = open_tf_checkpoint(folder)
        return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}
    except ModelError:
        return None


@pytest.mark.fast
def test_every_tensor_that_tensorflow_wrote_is_read_bit_for_bit():
    checkpoint = open_tf_checkpoint(FOLDER)

    assert list(checkpoint.tensors) == sorted(arrays())
    for name, expected in arrays().items():
        np.testing.assert_array_equal(checkpoint.read(name), expected, strict=True)


def test_names_that_share_prefixes_are_read_and_counted(tmp_path):
    def names(count: int) -> list[str]:
        block = pair(b"", HEADER)
        for n in range(count):
            key, value = b"a/%06d" % n, entry(shape(1), 4, offset=4 * n)
            block += pair(key[2:], value, 2) if n else pair(key, value)
        folder = folder_of(tmp_path, table(block + RESTARTS), bytes(4 * count))
        return list(open_tf_checkpoint(folder).tensors)

    assert names(3) == ["a/000000", "a/000001", "a/000002"]
    with pytest.raises(ModelError, match="10,000"):
        names(MAX_INDEX_ENTRIES + 1)


def test_each_changed_byte_of_the_index_is_noticed_or_changes_nothing(tiny):
    path = tiny / "model.ckpt.index"
    whole, expected = path.read_bytes(), read_all(tiny)

    accepted = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = read_all(tiny)
        assert found in (None, expected), place
        accepted += found is not None
    assert accepted < 20  # zeros inside the footer


def test_each_changed_tensor_is_noticed(tiny):
    checkpoint, data = open_tf_checkpoint(tiny), (tiny / DATA).read_bytes()

    for name, tensor in checkpoint.tensors.items():
        for place in (tensor.offset, tensor.offset + tensor.size - 1):
            changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            (tiny / DATA).write_bytes(changed)
            with pytest.raises(ModelError, match=f"checksum of '{name}'"):
                checkpoint.read(name)


def test_files_of_another_length_are_rejected(tiny):
    index, data = tiny / "model.ckpt.index", tiny / DATA
    whole, content, checkpoint = index.read_bytes(), data.read_bytes(), open_tf_checkpoint(tiny)

    for length in range(0, len(whole), 7):
        index.write_bytes(whole[:length])
        assert read_all(tiny) is None, length
    index.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match="magic number"):
        open_tf_checkpoint(tiny)
    index.write_bytes(whole)
    data.write_bytes(content[:-1])
    with pytest.raises(ModelError, match="15,775 bytes instead of 15,776"):
        open_tf_checkpoint(tiny)
    with pytest.raises(ModelError, match=DATA):  # cut after it was opened
        [checkpoint.read(name) for name in checkpoint.tensors]
    data.unlink()
    with pytest.raises(ModelError, match=DATA):
        open_tf_checkpoint(tiny)
    with index.open("ab") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(ModelError, match=f"{MAX_INDEX_BYTES:,}"):
        open_tf_checkpoint(tiny)


FOUR, BIG = entry(shape(4), 16), varint(1 << 62)
ONE, TWO = (pair(*p) + RESTARTS for p in ((b"", HEADER), (b"a", FOUR)))
INVALID_ENTRIES = [
    (entry(shape(3), 16), r"16 bytes and the invalid shape \(3,\)"),
    (entry(shape(*[1] * (MAX_TF_AXES + 1)), 4), "invalid shape"),
    (entry(shape(-1, -1), 4), "invalid shape"),
    (entry(shape(4), 16, offset=49), "64 bytes instead of 65"),
    (entry(shape(4), 16, offset=-1), "64 bytes instead of 18,446,744"),
    (entry(shape(4), 16, dtype=3), "'a' is not float32"),
    (FOUR + b"\x0a\x02a", "inside an entry"),
    (FOUR + b"\x08" + b"\x80" * 10, "ten bytes"),
    (FOUR + b"\x0b", "wire type 3"),
    (FOUR + proto((9, bytes(MAX_ENTRY_BYTES))), "1,000"),
]
INVALID_TABLES = [
    (index_of((b"a", FOUR), header=proto((1, 1), (2, 1))), "little-endian"),
    (index_of((b"a", FOUR), header=proto((1, 2))), "one .* file"),
    (index_of((b"a", FOUR), (b"b", entry(shape(4), 16, offset=15))), "'b' overlaps"),
    (table(TWO), "header"),
    (table(ONE, TWO, TWO), "sorted and unique"),
    (table(ONE, TWO.replace(b"a", b"\xff")), "utf-8"),
    (table(b""), "restart array"),
    (table(ONE[:-4] + b"\xff" * 4), "restart array"),
    (table(b"\0\2\2ab" + RESTARTS), "inside an entry"),
    (table(b"\1\1\0a" + RESTARTS), "1,000"),
    (table(b"\0\1" + BIG + b"a" + RESTARTS), "1,000"),
    (table(ONE, TWO, kind=b"\1"), "compressed"),
    (table(ONE, places=[b"\0" + varint(len(ONE))] * 2), "not in order"),
    (table(ONE, places=[BIG + b"\1"]), "block at 4,611,686,018,427,387,904"),
    (table(ONE, places=[b"\1\4"]), "checksum of its block at 1"),
]


def test_invalid_indexes_are_rejected_without_taking_memory(tmp_path):
    entries = [(index_of((b"a", value)), message) for value, message in INVALID_ENTRIES]

    for index, message in entries + INVALID_TABLES:
        folder = folder_of(tmp_path, index, bytes(64))
        tracemalloc.start()
        with pytest.raises(ModelError, match=rf"ckpt\.index .*{message}"):
            open_tf_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, message
        tracemalloc.stop()


def test_an_index_of_another_name_must_be_the_only_one(tiny):
    for file in (tiny / "model.ckpt.index", tiny / DATA):
        file.rename(file.with_name(file.name.replace("model.ckpt", "model-5")))
    assert read_all(tiny) == read_all(FOLDER)

    (tiny / "model-6.index").touch()
    with pytest.raises(ModelError, match=r"2 \*\.index files"):
        open_tf_checkpoint(tiny)
