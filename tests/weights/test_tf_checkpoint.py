"""OpenAI's checkpoints are read bit for bit, or not at all."""

import itertools
import shutil
from unittest import mock

import numpy as np
import pytest

from gptjax.errors import ModelError
from gptjax.weights import tf_checkpoint
from gptjax.weights.tf_checkpoint import open_tf_checkpoint
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
    index, data = tiny / "model.ckpt.index", tiny / DATA
    whole, content = index.read_bytes(), data.read_bytes()

    for damaged in (*(whole[:length] for length in range(0, len(whole), 7)), whole + b"\0"):
        index.write_bytes(damaged)
        assert read_all(tiny) is None, len(damaged)
    index.write_bytes(whole)
    for damaged in (content[:-1], content + b"\0"):
        data.write_bytes(damaged)
        with pytest.raises(ModelError, match=f"{len(damaged):,} bytes instead of 15,776"):
            open_tf_checkpoint(tiny)


REPLACED = [  # bytes of the index, others in their place, value in the message
    (b"\x08\x01\x1a", b"\x08\x02\x1a", "one little-endian data file"),
    (b"\x08\x01\x12", b"\x08\x03\x12", "not float32"),
    (b"\x08\x18(`", b"\x08\x19(`", r"invalid shape \(25,\)"),
    (b" \x80\t(", b" \x80\x08(", "overlaps"),
    (b"/h0/attn", b"/z0/attn", "sorted and unique"),
    (b"\0\xf4\x98\xd5k", b"\1\xf4\x98\xd5k", "compressed"),
    (b"\2\0\0\0\0\xf4", b"\2\1\0\0\0\xf4", "restart array"),
]


def test_an_index_with_valid_checksums_is_not_trusted(tiny, monkeypatch):
    monkeypatch.setattr(tf_checkpoint, "masked_crc32c", lambda content: mock.ANY)  # valid
    index = tiny / "model.ckpt.index"
    whole = index.read_bytes()

    for old, new, message in REPLACED:
        index.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ModelError, match=message):
            open_tf_checkpoint(tiny)
    for place, bits in itertools.product(range(0, len(whole), 7), (0x01, 0x80)):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        read_all(tiny)  # no other error than a ModelError


def test_the_tensors_of_an_index_and_their_entries_are_limited(monkeypatch):
    for name, limit in (("MAX_INDEX_ENTRIES", 10), ("MAX_ENTRY_BYTES", 20)):
        monkeypatch.setattr(tf_checkpoint, name, limit)
        with pytest.raises(ModelError, match=f"more than {limit} "):
            open_tf_checkpoint(FOLDER)
