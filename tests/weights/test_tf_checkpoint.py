"""OpenAI's checkpoints are read bit for bit, or not at all."""

import itertools
import shutil
import tracemalloc

import google_crc32c
import numpy as np
import pytest

from gptjax.errors import ModelError
from gptjax.weights.tf_checkpoint import MAX_INDEX_BYTES, MAX_INDEX_ENTRIES, open_tf_checkpoint
from tests.build_openai_fixture import FOLDER, arrays

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


def test_every_tensor_that_tensorflow_wrote_is_read_bit_for_bit():
    checkpoint = open_tf_checkpoint(FOLDER)

    assert list(checkpoint.tensors) == sorted(arrays())
    for name, expected in arrays().items():
        np.testing.assert_array_equal(checkpoint.read(name), expected, strict=True)


def test_each_changed_byte_is_noticed_or_changes_nothing(tiny):
    index, data, checkpoint = tiny / "model.ckpt.index", tiny / DATA, open_tf_checkpoint(tiny)
    whole, content, expected = index.read_bytes(), data.read_bytes(), read_all(tiny)

    accepted = 0
    for place in range(0, len(whole), 3):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = read_all(tiny)
        assert found in (None, expected), place
        accepted += found is not None
    assert accepted < 20  # zeros inside the footer
    for name, tensor in checkpoint.tensors.items():
        for place in (tensor.offset, tensor.offset + tensor.size - 1):
            changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            data.write_bytes(changed)
            with pytest.raises(ModelError, match=f"checksum of '{name}'"):
                checkpoint.read(name)


def test_files_of_another_length_are_rejected(tiny):
    index, data, checkpoint = tiny / "model.ckpt.index", tiny / DATA, open_tf_checkpoint(tiny)
    whole, content = index.read_bytes(), data.read_bytes()

    for damaged in (*(whole[:length] for length in range(0, len(whole), 7)), whole + b"\0"):
        index.write_bytes(damaged)
        assert read_all(tiny) is None, len(damaged)
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


# A writer of indexes, independent of the reader.
def varint(number: int) -> bytes:
    number %= 1 << 64
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def proto(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of (number, value): bytes with their length, integers as varints."""
    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def entry(*shape: int, size: int, dtype=1, offset=0) -> bytes:
    """A tensor whose checksum is 0."""
    axes = proto(*((2, proto((1, length))) for length in shape))
    return proto((1, dtype), (2, axes), (4, offset), (5, size))


def sealed(block: bytes) -> bytes:
    crc = google_crc32c.value(block)
    masked = ((crc >> 15) + (crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % (1 << 32)
    return block + masked.to_bytes(4, "little")


def pair(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return b"".join(map(varint, (shared, len(key), len(value)))) + key + value


RESTARTS = bytes(4) + b"\x01\0\0\0"  # of a block: one, at its start
HEADER = proto((1, 1), (3, proto((1, 1))))  # one data file, version 1


def table(*blocks: bytes, kind: bytes = b"\0", handles=()) -> bytes:
    """A table of these blocks, whose index has these handles if there are any."""
    data, places = b"", []
    for content in (*blocks, RESTARTS):  # the last: metadata
        places.append(varint(len(data)) + varint(len(content)))
        data += sealed(content + kind)
        kind = kind if len(places) < len(blocks) else b"\0"
    keys = (b"%08d" % number for number in itertools.count())
    index = b"".join(map(pair, keys, handles or places[:-1])) + RESTARTS
    footer = (places[-1] + varint(len(data)) + varint(len(index))).ljust(40, b"\0")
    return data + sealed(index + b"\0") + footer + bytes.fromhex("57fb808b247547db")


def test_the_number_of_tensors_is_limited(tmp_path):
    value = entry(1, size=4)
    pairs = (pair(b"%06d" % n, value) for n in range(MAX_INDEX_ENTRIES))
    (tmp_path / "model.ckpt.index").write_bytes(table(b"".join(pairs) + RESTARTS, ONE))

    with pytest.raises(ModelError, match="10,000"):
        open_tf_checkpoint(tmp_path)


def index_of(value: bytes, *others: tuple[bytes, bytes], header: bytes = HEADER) -> bytes:
    pairs = (b"", header), (b"a", value), *others
    return table(b"".join(pair(*p) for p in pairs) + RESTARTS)


FOUR, BIG = entry(4, size=16), varint(1 << 62)
ONE, TWO = (pair(*p) + RESTARTS for p in ((b"", HEADER), (b"a", FOUR)))
INVALID_INDEXES = [
    (index_of(entry(3, size=16)), r"16 bytes and the invalid shape \(3,\)"),
    (index_of(entry(-1, -1, size=4)), "invalid shape"),
    (index_of(entry(4, size=16, offset=49)), "64 bytes instead of 65"),
    (index_of(entry(4, size=16, offset=-1)), "64 bytes instead of 18,446,744"),
    (index_of(entry(4, size=16, dtype=3)), "'a' is not float32"),
    (index_of(FOUR + b"\x0a\x02a"), "inside an entry"),
    (index_of(FOUR + b"\x08" + b"\x80" * 10), "ten bytes"),
    (index_of(FOUR + b"\x0b"), "wire type 3"),
    (index_of(FOUR + proto((9, bytes(1000)))), "1,000"),
    (index_of(FOUR, header=proto((1, 1), (2, 1))), "little-endian"),
    (index_of(FOUR, header=proto((1, 2))), "one .* file"),
    (index_of(FOUR, (b"b", entry(4, size=16, offset=15))), "'b' overlaps"),
    (table(TWO), "header"),
    (table(ONE, TWO, TWO), "sorted and unique"),
    (table(ONE, TWO.replace(b"a", b"\xff")), "utf-8"),
    (table(b""), "restart array"),
    (table(b"\0\2\2ab" + RESTARTS), "inside an entry"),
    (table(b"\0\1" + BIG + b"a" + RESTARTS), "1,000"),
    (table(ONE, TWO, kind=b"\1"), "compressed"),
    (table(ONE, handles=[b"\0" + varint(len(ONE))] * 2), "not in order"),
    (table(ONE, handles=[BIG + b"\1"]), "block at 4,611,686,018,427,387,904"),
    (table(ONE, handles=[b"\1\4"]), "checksum of its block at 1"),
]


def test_invalid_indexes_are_rejected_without_taking_memory(tmp_path):
    (tmp_path / DATA).write_bytes(bytes(64))
    for index, message in INVALID_INDEXES:
        (tmp_path / "model.ckpt.index").write_bytes(index)
        tracemalloc.start()
        with pytest.raises(ModelError, match=rf"ckpt\.index .*{message}"):
            open_tf_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, message
        tracemalloc.stop()


def test_an_index_of_another_name_must_be_the_only_one(tiny):
    for file in (tiny / "model.ckpt.index", tiny / DATA):
        file.rename(file.with_name(file.name.replace("model.ckpt", "model-5")))
    assert read_all(tiny) == read_all(FOLDER)

    (tiny / "model-6.index").touch()
    with pytest.raises(ModelError, match=r"2 \*\.index files"):
        open_tf_checkpoint(tiny)
