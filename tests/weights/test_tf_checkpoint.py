"""OpenAI's files come back bit for bit, or not at all."""

import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import ModelError
from gptjax.weights.tf_checkpoint import (
    HPARAM_NAMES,
    MAX_INDEX_BYTES,
    TF_DTYPES,
    crc32c,
    open_tf_checkpoint,
    read_hparams,
)
from tests.build_openai_fixture import FOLDER, arrays
from tests.build_openai_fixture import HPARAMS as SIZES
from tests.tensor_bundle import (
    HEADER,
    RESTARTS,
    bytewise,
    entry,
    folder_of,
    index_of,
    masked,
    proto,
    shape,
    table,
)

DATA = "model.ckpt.data-00000-of-00001"
AGAIN = r"Copy the folder again, or download the model again\.$"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A copy of TensorFlow's checkpoint, to be damaged."""
    return shutil.copytree(FOLDER, tmp_path / "tiny")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder for all examples of one test."""
    return tmp_path_factory.mktemp("openai")


def bits(array: np.ndarray) -> tuple:
    return array.dtype, array.shape, array.tobytes()


def outcome(folder: Path) -> dict | None:
    """All tensors by name, or None if anything is refused."""
    try:
        checkpoint = open_tf_checkpoint(folder)
        return {name: bits(checkpoint.read(name)) for name in checkpoint.tensors}
    except ModelError as error:
        if str(folder) not in str(error):
            raise
        return None


# ---- What TensorFlow wrote is read.


@pytest.mark.fast
def test_every_tensor_that_tensorflow_wrote_is_read_bit_for_bit():
    checkpoint = open_tf_checkpoint(FOLDER)

    assert list(checkpoint.tensors) == sorted(arrays())
    for name, expected in arrays().items():
        found = checkpoint.read(name)
        assert bits(found) == bits(expected)
        assert found.flags.c_contiguous
        assert found.flags.owndata
        assert found.flags.writeable
        tensor = checkpoint.tensors[name]
        assert (tensor.name, tensor.shape) == (name, expected.shape)
        assert tensor.dtype == np.float32
    assert read_hparams(FOLDER) == SIZES


def test_the_plain_writer_writes_what_tensorflow_wrote(tmp_path):
    data = (FOLDER / DATA).read_bytes()
    pairs = []
    for name, tensor in open_tf_checkpoint(FOLDER).tensors.items():
        part = data[tensor.offset : tensor.offset + tensor.size]
        dims = shape(*tensor.shape)
        made = entry(dims, tensor.size, offset=tensor.offset, crc=masked(bytewise(part)))
        pairs.append((name.encode(), made))

    folder = folder_of(tmp_path / "own", index_of(*pairs), data)

    assert outcome(folder) == outcome(FOLDER)


@pytest.mark.parametrize("number", TF_DTYPES)
def test_types_scalars_and_several_files_are_read(tmp_path, number):
    values = np.array([1.5, -2, 0.25, 7], TF_DTYPES[number])
    raw = values.tobytes()
    size = values.itemsize
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


def test_a_tensor_is_read_in_blocks_of_bounded_memory(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, 11 << 20, np.uint8)
    made = entry(shape(11, 1 << 18), values.nbytes, crc=masked(crc32c(values)))
    folder = folder_of(tmp_path, index_of((b"a", made)), values.tobytes())
    checkpoint = open_tf_checkpoint(folder)

    tracemalloc.start()
    found = checkpoint.read("a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert found.tobytes() == values.tobytes()
    assert peak < values.nbytes + (3 << 20)


# ---- Damage.


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_each_changed_byte_of_the_index_is_refused_or_changes_nothing(tiny, flip):
    path = tiny / "model.ckpt.index"
    whole, expected = path.read_bytes(), outcome(tiny)
    unread = 0

    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        found = outcome(tiny)
        assert found in (None, expected), place
        unread += found is not None
    assert unread < 40  # zeros inside the footer


def test_each_changed_byte_of_the_data_is_refused(tiny):
    checkpoint = open_tf_checkpoint(tiny)
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.offset)
    end = 0

    with (tiny / DATA).open("r+b", buffering=0) as file:
        for tensor in tensors:
            assert tensor.offset == end
            end += tensor.size
            for place in range(tensor.offset, end, 1 + (tensor.size > 1000) * 6):
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << place % 8]))
                with pytest.raises(ModelError, match="is damaged: the checksum of"):
                    checkpoint.read(tensor.name)
                file.seek(place)
                file.write(bytes([byte]))
    assert end == (tiny / DATA).stat().st_size
    assert outcome(tiny) == outcome(FOLDER)


def test_an_index_of_any_shorter_or_longer_length_is_refused(tiny):
    path = tiny / "model.ckpt.index"
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert outcome(tiny) is None, length
        path.write_bytes(whole[length + 1 :])
        assert outcome(tiny) is None, length
    path.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match=f"with the magic number of .*{AGAIN}"):
        open_tf_checkpoint(tiny)


def test_data_of_any_shorter_length_is_refused(tiny):
    whole = (tiny / DATA).read_bytes()

    for length in range(0, len(whole), 311):
        (tiny / DATA).write_bytes(whole[:length])
        message = rf"{DATA} has {length:,} bytes instead of 15,776\. {AGAIN}"
        with pytest.raises(ModelError, match=message):
            open_tf_checkpoint(tiny)


def test_data_that_goes_away_after_the_index_was_read_is_refused(tiny):
    checkpoint = open_tf_checkpoint(tiny)
    (tiny / DATA).write_bytes(b"short")

    with pytest.raises(ModelError, match=f"00001 ends inside 'model/wte'. {AGAIN}"):
        checkpoint.read("model/wte")
    (tiny / DATA).unlink()
    with pytest.raises(ModelError, match=f"cannot read .*00001: .*No such.* {AGAIN}"):
        checkpoint.read("model/wte")


@settings(derandomize=True, max_examples=100)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(scratch, content):
    magic = bytes.fromhex("57fb808b247547db")
    for index in (content, content + magic, table(content), table(content, RESTARTS)):
        assert not outcome(folder_of(scratch, index, bytes(64)))


@settings(derandomize=True, max_examples=100)
@given(st.binary(max_size=40), st.binary(max_size=80), st.binary(max_size=20))
def test_random_entries_with_right_checksums_are_refused(scratch, key, value, header):
    for index in (
        index_of((b"a" + key, value)),
        index_of((b"a", value), header=header),
        index_of((b"a", entry(key, 64))),
        index_of((b"a", entry(value, 64))),
    ):
        assert not outcome(folder_of(scratch, index, bytes(64)))


@pytest.mark.parametrize("flip", [0x01, 0x40, 0x80])
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


# ---- Files.


def test_the_index_is_that_which_the_folder_names(tmp_path):
    def prefix() -> str:
        return open_tf_checkpoint(tmp_path).index.name.removesuffix(".index")

    for suffix in ("index", "data-00000-of-00001"):
        for name in ("model-5", "model.ckpt", "other"):
            source = FOLDER / f"model.ckpt.{suffix}"
            shutil.copy(source, tmp_path / f"{name}.{suffix}")
    named = tmp_path / "checkpoint"

    assert prefix() == "model.ckpt"
    named.write_text('model_checkpoint_path: "model-5"\nall_model...: "model-4"\n')
    assert prefix() == "model-5"
    assert outcome(tmp_path) == outcome(FOLDER)
    named.write_text('model_checkpoint_path: "model-6"\n')
    with pytest.raises(ModelError, match=rf"model-6\.index does not exist .*{AGAIN}"):
        prefix()
    for path in ("/a/model-5", "../tiny/model-5", "a\\\\model-5", "C:model-5", "..", ""):
        named.write_text(f'model_checkpoint_path: "{path}"\n')
        assert prefix() == "model.ckpt"
    named.write_bytes(b"\xff\0" * 9)
    assert prefix() == "model.ckpt"
    (tmp_path / "model.ckpt.index").unlink()
    with pytest.raises(ModelError, match=r"has 2 \*\.index files"):
        prefix()
    (tmp_path / "model-5.index").unlink()
    assert prefix() == "other"
    named.write_bytes(bytes(1 << 17))
    with pytest.raises(ModelError, match="checkpoint has 131,072 bytes, more than"):
        prefix()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"has 0 \*\.index files"):
        open_tf_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"has 0 \*\.index files"):
        open_tf_checkpoint(tmp_path / "none")
    with pytest.raises(ModelError, match=rf"hparams\.json does not exist .*{AGAIN}"):
        read_hparams(tmp_path)
    (tmp_path / "model.ckpt.index").mkdir()
    with pytest.raises(ModelError, match=rf"ckpt\.index does not exist .*{AGAIN}"):
        open_tf_checkpoint(tmp_path)
    (tmp_path / "model.ckpt.index").rmdir()
    shutil.copy(FOLDER / "model.ckpt.index", tmp_path)
    with pytest.raises(ModelError, match=f"{DATA} has 0 bytes instead of 15,776. Copy"):
        open_tf_checkpoint(tmp_path)


def test_an_index_of_too_many_bytes_is_not_read(tiny):
    with (tiny / "model.ckpt.index").open("ab") as file:
        file.truncate(MAX_INDEX_BYTES + 1)

    with pytest.raises(ModelError, match=r"has 67,108,865 bytes, more .* 67,108"):
        open_tf_checkpoint(tiny)


def test_a_tensor_that_is_not_there_is_a_model_error():
    with pytest.raises(ModelError, match=r"index has no tensor 'wte'\."):
        open_tf_checkpoint(FOLDER).read("wte")


@pytest.mark.parametrize("name", HPARAM_NAMES)
@pytest.mark.parametrize("value", [0, -1, True, 1.0, "8", None, [8], {}])
def test_a_size_that_is_no_positive_integer_is_refused(tmp_path, name, value):
    (tmp_path / "hparams.json").write_text(json.dumps(SIZES | {name: value, "x": 1}))

    message = rf"json cannot be used: {name}=.* is not a positive integer\. {AGAIN}"
    with pytest.raises(ModelError, match=message):
        read_hparams(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"7", b"null", b"{", b"\xff", b"{}", b'{"n_vocab": NaN}'),
        *(b"[" * 60_000, b'{"n_vocab": ' + b"[" * 900 + b"]" * 900 + b"}"),
        *(b'{"n_vocab": ' + b"9" * 5_000 + b"}", b" " * 70_000),
    ],
)
def test_hparams_that_are_no_table_of_sizes_are_refused(tmp_path, content):
    (tmp_path / "hparams.json").write_bytes(content)

    with pytest.raises(ModelError, match=rf"hparams\.json .*{AGAIN}"):
        read_hparams(tmp_path)


def test_other_hparams_are_left_out(tmp_path):
    (tmp_path / "hparams.json").write_text(json.dumps({"n_x": "?"} | SIZES))

    assert read_hparams(tmp_path) == SIZES
