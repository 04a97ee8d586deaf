"""OpenAI's checkpoints are read bit for bit, or not at all."""

import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gptjax.errors import ModelError
from gptjax.weights.tf_checkpoint import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_BYTES,
    MAX_INDEX_ENTRIES,
    MAX_TF_AXES,
    TF_DTYPES,
    find_index_file,
    open_tf_checkpoint,
)
from tests.build_openai_fixture import FOLDER, arrays
from tests.tensor_bundle import (
    HEADER,
    RESTARTS,
    bytewise,
    entry,
    folder_of,
    index_of,
    masked,
    pair,
    proto,
    shape,
    table,
    varint,
)

DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A copy of TensorFlow's checkpoint, to be damaged."""
    return shutil.copytree(FOLDER, tmp_path / "tiny")


def bits(array: np.ndarray) -> tuple:
    return array.dtype, array.shape, array.tobytes()


def outcome(folder: Path) -> dict | None:
    """All tensors by name, or None if the checkpoint is rejected."""
    try:
        checkpoint = open_tf_checkpoint(folder)
        return {name: bits(checkpoint.read(name)) for name in checkpoint.tensors}
    except ModelError as error:
        if str(folder) not in str(error):
            raise
        return None


@pytest.mark.fast
def test_every_tensor_that_tensorflow_wrote_is_read_bit_for_bit():
    checkpoint = open_tf_checkpoint(FOLDER)

    assert list(checkpoint.tensors) == sorted(arrays())
    for name, expected in arrays().items():
        assert bits(checkpoint.read(name)) == bits(expected)
        assert checkpoint.tensors[name].shape == expected.shape


@pytest.mark.parametrize("number", TF_DTYPES)
def test_dtypes_scalars_and_several_files_are_read(tmp_path, number):
    values = np.array([1.5, -2, 0.25, 7], TF_DTYPES[number])
    raw, size = values.tobytes(), values.itemsize
    header = proto((1, 2), (3, proto((1, 1), (2, 1))))
    first, last = (masked(bytewise(part)) for part in (raw[:-size], raw[-size:]))
    one = entry(shape(3, 1), 3 * size, dtype=number, shard=1, offset=5, crc=first)
    two = entry(b"", size, dtype=number, crc=last)
    index = index_of((b"../a", one), (b"b", two), header=header)

    folder = folder_of(tmp_path, index, raw[3 * size :], b"*****" + raw)
    checkpoint = open_tf_checkpoint(folder)

    assert bits(checkpoint.read("../a")) == bits(values[:3].reshape(3, 1))
    assert bits(checkpoint.read("b")) == bits(values[3])
    assert TF_DTYPES[14] == ml_dtypes.bfloat16


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


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_each_changed_byte_of_the_index_is_noticed_or_changes_nothing(tiny, flip):
    path = tiny / "model.ckpt.index"
    whole, expected = path.read_bytes(), outcome(tiny)
    unread = 0

    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        found = outcome(tiny)
        assert found in (None, expected), place
        unread += found is not None
    assert unread < 20  # zeros inside the footer


def test_each_changed_byte_of_the_data_is_noticed(tiny):
    checkpoint = open_tf_checkpoint(tiny)

    with (tiny / DATA).open("r+b", buffering=0) as file:
        for name, tensor in checkpoint.tensors.items():
            step = max(tensor.size // 10, 1)
            for place in (*range(0, tensor.size, step), tensor.size - 1):
                file.seek(tensor.offset + place)
                byte = file.read(1)[0]
                file.seek(tensor.offset + place)
                file.write(bytes([byte ^ 1 << place % 8]))
                with pytest.raises(ModelError, match=f"checksum of '{name}'"):
                    checkpoint.read(name)
                file.seek(tensor.offset + place)
                file.write(bytes([byte]))
    assert outcome(tiny) == outcome(FOLDER)


def test_files_of_another_length_are_rejected(tiny):
    index, data = tiny / "model.ckpt.index", tiny / DATA
    whole, content, checkpoint = index.read_bytes(), data.read_bytes(), open_tf_checkpoint(tiny)

    for length in range(0, len(whole), 7):
        index.write_bytes(whole[:length])
        assert outcome(tiny) is None, length
    index.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match="magic number"):
        open_tf_checkpoint(tiny)
    index.write_bytes(whole)
    for length in range(0, len(content), 1311):
        data.write_bytes(content[:length])
        with pytest.raises(ModelError, match=f"{length:,} bytes instead of 15,776"):
            open_tf_checkpoint(tiny)
        with pytest.raises(ModelError, match=DATA):  # cut after it was opened
            checkpoint.read("model/wte")
    data.unlink()
    with pytest.raises(ModelError, match=f"{DATA} has 0 bytes instead of 15,776"):
        open_tf_checkpoint(tiny)
    with index.open("ab") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(ModelError, match=f"{MAX_INDEX_BYTES:,}"):
        open_tf_checkpoint(tiny)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_changed_entry_with_a_right_checksum_raises_no_other_error(tmp_path, flip):
    content = np.arange(16, dtype="<f4").tobytes()
    good = entry(shape(4, 4), 64, crc=masked(bytewise(content)))

    for value in (good, HEADER):
        for place in range(len(value)):
            bad = bytearray(value)
            bad[place] ^= flip
            values = (good, bytes(bad)) if value == HEADER else (bytes(bad), HEADER)
            index = index_of((b"a", values[0]), header=values[1])
            found = outcome(folder_of(tmp_path, index, content))
            assert not found or found["a"][2] == content


FOUR, BIG = entry(shape(4), 16), varint(1 << 62)
ONE, TWO = (pair(*p) + RESTARTS for p in ((b"", HEADER), (b"a", FOUR)))
INVALID = {  # index, what the message contains
    **{
        name: (index_of((b"a", value)), message)
        for name, value, message in [
            ("no rank", entry(proto((3, 1)), 4), r"4 bytes and the invalid shape \(\)"),
            ("another size", entry(shape(3), 16), r"16 bytes and the invalid shape \(3,\)"),
            ("no values", entry(shape(0, 1 << 62), 0), "invalid shape"),
            ("many axes", entry(shape(*[1] * (MAX_TF_AXES + 1)), 4), "invalid shape"),
            ("negative", entry(shape(-1, -1), 4), "invalid shape"),
            ("another file", entry(shape(4), 16, shard=1), "data file 1 of only 1"),
            ("too large", entry(shape(1 << 40), 1 << 42), "64 bytes instead of 4,398,046,"),
            ("outside", entry(shape(4), 16, offset=49), "64 bytes instead of 65"),
            ("far outside", entry(shape(4), 16, offset=-1), "64 bytes instead of 18,446,744"),
            ("truncated field", FOUR + b"\x0a\x02a", "inside an entry"),
            ("long field", FOUR + b"\x0a" + varint(-1), "inside an entry"),
            ("long integer", FOUR + b"\x08" + b"\x80" * 10, "ten bytes"),
            ("group", FOUR + b"\x0b", "wire type 3"),
            ("long entry", FOUR + proto((9, bytes(MAX_ENTRY_BYTES))), "1,000"),
            ("integers", entry(shape(4), 16, dtype=3), "dtype 3"),
            ("slices", FOUR + proto((7, b"")), "slices"),
        ]
    },
    **{
        name: (index_of((b"a", FOUR), header=header), message)
        for name, header, message in [
            ("big-endian", proto((1, 1), (2, 1)), "big-endian"),
            ("newer", proto((1, 1), (3, proto((2, 2)))), "version 2"),
            ("no files", proto((1, 0)), "0 data files"),
            ("many files", proto((1, 100_000)), "100,000 data files"),
        ]
    },
    **{
        name: (table(*blocks), message)
        for name, blocks, message in [
            ("no entries", [RESTARTS], "header"),
            ("no header", [TWO], "header"),
            ("duplicate name", [ONE, TWO, TWO], "sorted and unique"),
            ("unsorted names", [TWO, ONE], "sorted and unique"),
            ("name not UTF-8", [ONE, TWO.replace(b"a", b"\xff")], "utf-8"),
            ("no restarts", [b""], "restart array"),
            ("many restarts", [ONE[:-4] + b"\xff" * 4], "restart array"),
            ("truncated pair", [b"\0\2\2ab" + RESTARTS], "inside an entry"),
            ("prefix of nothing", [b"\1\1\0a" + RESTARTS], "1,000"),
            ("long name", [pair(b"a" * 1001, b"") + RESTARTS], "1,000"),
            ("huge name", [b"\0" + BIG + b"\0" + RESTARTS], "1,000"),
            ("huge value", [b"\0\1" + BIG + b"a" + RESTARTS], "1,000"),
        ]
    },
    **{
        f"block {name}": (table(ONE, places=places), message)
        for name, places, message in [
            ("twice", [b"\0" + varint(len(ONE))] * 2, "not in order"),
            ("outside", [BIG + b"\1"], "block at 4,611,686,018,427,387,904"),
            ("huge", [b"\0" + BIG], "block at 0"),
            ("elsewhere", [b"\1\4"], "checksum of its block at 1"),
            ("truncated", [b"\1"], "inside an entry"),
        ]
    },
    "compressed": (table(ONE, TWO, kind=b"\1"), "compressed"),
    "overlap": (index_of((b"a", FOUR), (b"b", entry(shape(4), 16, offset=15))), "'b' overlaps"),
}


def test_invalid_indexes_are_rejected_without_taking_memory(tmp_path):
    for name, (index, message) in INVALID.items():
        folder = folder_of(tmp_path, index, bytes(64))
        tracemalloc.start()
        try:
            with pytest.raises(ModelError, match=rf"ckpt\.index .*{message}"):
                open_tf_checkpoint(folder)
        except BaseException as failure:
            failure.add_note(name)
            raise
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, name


def test_the_index_is_that_which_the_folder_names(tmp_path):
    def prefix() -> str:
        open_tf_checkpoint(tmp_path)
        return find_index_file(tmp_path).name.removesuffix(".index")

    for suffix in ("index", "data-00000-of-00001"):
        for name in ("model-5", "model.ckpt", "other"):
            shutil.copy(FOLDER / f"model.ckpt.{suffix}", tmp_path / f"{name}.{suffix}")
    checkpoint = tmp_path / "checkpoint"

    assert prefix() == "model.ckpt"
    checkpoint.write_text('model_checkpoint_path: "model-5"\nall_model...: "model-4"\n')
    assert prefix() == "model-5"
    checkpoint.write_text('model_checkpoint_path: "model-6"\n')
    with pytest.raises(ModelError, match=r"model-6\.index"):
        prefix()
    for path in ("/a/model-5", "../tiny/model-5", "a\\\\model-5", "C:model-5", "..", ""):
        checkpoint.write_text(f'model_checkpoint_path: "{path}"\n')
        assert prefix() == "model.ckpt"
    checkpoint.write_bytes(b"\xff\0" * 9)
    (tmp_path / "model.ckpt.index").unlink()
    with pytest.raises(ModelError, match=r"2 \*\.index files"):
        prefix()
    (tmp_path / "model-5.index").unlink()
    assert prefix() == "other"
    checkpoint.write_bytes(bytes(1 << 17))
    with pytest.raises(ModelError, match="65,536"):
        prefix()
    with pytest.raises(ModelError, match=r"0 \*\.index files"):
        open_tf_checkpoint(tmp_path / "none")
