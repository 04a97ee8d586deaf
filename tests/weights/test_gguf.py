"""GGUF files are read number for number, or not at all."""

import struct

import ml_dtypes
import numpy as np
import pytest

from gptjax.errors import ModelError
from gptjax.weights.gguf import MAX_ALIGNMENT, is_gguf, open_gguf
from tests.gguf_files import gguf_bytes, pack_string

RNG = np.random.default_rng(0)
METADATA = {
    "general.name": "tiny é",
    "sizes": [3, -4],
    "eps": 1e-5,
    "flag": True,
    "flags": [True, False],
    "words": ["a", "", "ü"],
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
TENSORS = {name: (RNG.normal(size=(3, 64)).astype("float32"), name) for name in TYPES}
TENSORS["last"] = (RNG.normal(size=(2, 3, 5)).astype("float32"), "F32")  # needs padding


def write(folder, data):
    path = folder / "x.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 8)])
def test_metadata_and_tensors_of_all_types_are_read(tmp_path, version, alignment):
    about = METADATA | {"general.alignment": alignment}
    data = gguf_bytes(about, TENSORS, version=version, alignment=alignment)

    metadata, reader = open_gguf(write(tmp_path, data))

    lists = {key: metadata.pop(key) for key in ("sizes", "flags", "words")}
    assert {key: list(items) for key, items in lists.items()} | metadata == about
    assert list(reader.tensors) == list(TENSORS)
    for name, (array, type_name) in TENSORS.items():
        found, most = reader.read(name), np.abs(array).max()
        assert found.dtype == reader.tensors[name].dtype == np.float32
        assert found.shape == reader.tensors[name].shape == array.shape
        step = {"F16": 2e-3, "BF16": 8e-3, "Q8_0": 1 / 254, "Q4_0": 1 / 14, "Q4_1": 1 / 15}
        assert np.abs(found - array).max() <= step.get(type_name, 0) * most * 1.01


def test_blocks_are_dequantized_as_the_format_says(tmp_path):
    nibbles = np.arange(16, dtype="u1")  # element j is j, element j + 16 is 15 - j
    q = (nibbles | (15 - nibbles) << 4).tobytes()
    ints = np.arange(-16, 16, dtype="i1")
    d, m = np.float16(0.3), np.float16(-1.7)
    both = np.concatenate([nibbles, 15 - nibbles]).astype("float32")
    expected = {
        "Q8_0": (d.tobytes() + ints.tobytes(), np.float32(d) * ints),
        "Q4_0": (d.tobytes() + q, np.float32(d) * (both - 8)),
        "Q4_1": (d.tobytes() + m.tobytes() + q, np.float32(d) * both + np.float32(m)),
        "BF16": (ints.astype(ml_dtypes.bfloat16).tobytes(), ints.astype("float32")),
    }
    for type_name, (block, values) in expected.items():
        data = gguf_bytes({}, {"x": (np.arange(32.0)[None], type_name)})
        data = data[: len(data) - -(-len(block) // 32) * 32] + block

        _, reader = open_gguf(write(tmp_path, data))

        np.testing.assert_array_equal(reader.read("x"), values[None].astype("float32"))


def test_the_magic_number_or_the_extension_shows_the_format(tmp_path):
    for name, content in {"a.gguf": b"", "b": b"GGUF", "c": b"GGU", "d.bin": b"PK"}.items():
        (tmp_path / name).write_bytes(content)

    assert [is_gguf(tmp_path / name) for name in ("a.gguf", "b", "c", "d.bin")] == [1, 1, 0, 0]
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "e.gguf")


def tensor_info(name="x", dims=(4,), number=0, offset=0):
    return (
        pack_string(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", number, offset)
    )


def header(*tensors, keys=(), num_tensors=None, num_keys=None, magic=b"GGUF", version=3):
    """The start of a file with counts that may be wrong."""
    counts = (num_tensors or len(tensors), num_keys or len(keys))
    return magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])


def key_value(name, kind, value):
    return pack_string(name) + struct.pack("<I", kind) + value


HUGE = 2**64 - 1
INVALID = [  # start of a file, part of the message
    (b"", "4 bytes too early"),
    (header(magic=b"GGML"), "GGUF"),
    (header(version=1), "version 1,"),
    (header(version=3 << 24), "version 50331648"),
    (header(num_tensors=HUGE), "too early"),
    (header(num_keys=HUGE), "too early"),
    (header(keys=[struct.pack("<Q", HUGE)]), f"{HUGE:,} bytes"),
    (header(keys=[key_value("a", 4, b"\0\0\0\0")] * 2), "two keys 'a'"),
    (header(keys=[key_value(b"\xff", 4, b"\0\0\0\0")]), "utf-8"),
    (header(keys=[key_value("a", 13, b"\0\0\0\0")]), "'a' .* type 13"),
    (header(keys=[key_value("a", 7, b"\2")]), "'a' .* 2"),
    (header(keys=[key_value("a", 9, struct.pack("<IQ", 9, 1))]), "'a' .* arrays"),
    (header(keys=[key_value("a", 9, struct.pack("<IQ", 12, HUGE))]), f"{HUGE * 8:,} bytes"),
    (header(keys=[key_value("a", 9, struct.pack("<IQ", 8, HUGE))]), "too early"),
    *[
        (header(keys=[key_value("general.alignment", 4, struct.pack("<I", n))]), f"alignment={n} ")
        for n in (0, 24, 2 * MAX_ALIGNMENT)
    ],
    (header(keys=[key_value("general.alignment", 8, pack_string("32"))]), "alignment='32'"),
    (header(tensor_info(name="x" * 64)), "64 bytes"),
    (header(tensor_info(dims=())), "'x' has 0 dims"),
    (header(tensor_info(dims=(1,) * 5)), "'x' has 5 dims"),
    (header(tensor_info(dims=(4, 0))), r"'x' .* \(4, 0\)"),
    (header(tensor_info(dims=(HUGE, HUGE, HUGE, HUGE))), "'x' ends at"),
    (header(tensor_info(number=12)), r"'x' .* 12 \(Q4_K\)"),
    (header(tensor_info(number=4)), "'x' .* 4 "),
    (header(tensor_info(number=99)), "'x' .* 99 "),
    (header(tensor_info(dims=(48, 32), number=2)), "'x' .* 48 "),
    (header(tensor_info(offset=32)), "'x' .* 32 "),
    (header(tensor_info(), tensor_info("y", offset=16)), "'y' .* 16 .* 32"),
    (header(tensor_info(), tensor_info("y", offset=0)), "'y' .* 0 .* 32"),
    (header(tensor_info(), tensor_info(offset=32)), "two tensors 'x'"),
    (header(tensor_info(dims=(9,))), "'x' ends at byte 100, .* 80"),
]


def test_invalid_files_are_rejected_before_anything_is_allocated(tmp_path):
    valid = header(tensor_info(dims=(4,)))
    for padding in (16, 32):
        open_gguf(write(tmp_path, valid + bytes(-len(valid) % 32 + padding)))
    with pytest.raises(ModelError, match=r"end at byte 96, .* 97"):
        open_gguf(write(tmp_path, valid + bytes(-len(valid) % 32 + 33)))

    for start, message in INVALID:
        path = write(tmp_path, start + bytes(-len(start) % 32 + 16) * bool(start[44:]))
        with pytest.raises(ModelError, match=f"x.gguf: .*{message}"):
            open_gguf(path)


def test_a_file_cut_anywhere_is_rejected_also_after_it_was_opened(tmp_path):
    whole = gguf_bytes(METADATA, {name: TENSORS[name] for name in ("Q4_1", "last")})
    path = write(tmp_path, whole)
    _, reader = open_gguf(path)

    path.write_bytes(whole[:-40])
    with pytest.raises(ModelError, match="too early"):
        reader.read("last")
    for length in range(0, len(whole) - 8, 7):
        with pytest.raises(ModelError, match=str(path)):
            open_gguf(write(tmp_path, whole[:length]))
