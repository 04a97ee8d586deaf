"""Safetensors files: read exactly, or refused with one clear error."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gptjax.errors import ModelError
from gptjax.weights.safetensors import open_safetensors


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(2, 3, 2)).astype(np.float16),
        "c": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.float32),
        "mask": np.tril(np.ones((4, 4), bool)),
    }


@pytest.fixture
def path(arrays, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    return path


def crafted(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def line(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}


@pytest.mark.fast
def test_tensors_are_those_that_the_library_wrote(arrays, path):
    found = open_safetensors([path])

    assert set(found.tensors) == set(arrays)
    assert found.metadata == {"format": "pt"}
    for name, array in arrays.items():
        entry = found.tensors[name]
        assert (entry.shape, entry.dtype) == (array.shape, array.dtype)
        assert found.read(name).tobytes() == array.tobytes()


def test_several_files_are_one_set_of_names_that_differ(path, tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"d": np.ones(2, np.float32)}, other)

    assert "d" in open_safetensors([path, other]).tensors

    with pytest.raises(ModelError, match="another file also has the tensor a"):
        open_safetensors([path, path])


HOSTILE = {
    "a header bomb": (struct.pack("<Q", 1 << 62), "a header of"),
    "a header above the most": (
        struct.pack("<Q", (1 << 20) + 1) + b" " * (1 << 21),
        "a header of 1,048,577 bytes",
    ),
    "a header that is not UTF-8": (struct.pack("<Q", 3) + b'"\xff"', "not JSON"),
    "a header longer than the file": (struct.pack("<Q", 100) + b"{}", "a header of"),
    "nothing": (b"", "a header of 0 bytes in a file of 0"),
    "no JSON": (struct.pack("<Q", 3) + b"abc", "not JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not an object"),
    "deep nesting": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
}
LINES = {
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "duplicate keys",
    ),
    "a gap": ({"a": line(offsets=(4, 12))}, "no tensor starts at byte"),
    "an overlap": ({"a": line(), "b": line(offsets=(4, 12))}, "no tensor starts at byte"),
    "more than the file": ({"a": line((4,), (0, 16))}, "but its tensors need"),
    "less than the file": ({"a": line((1,), (0, 4))}, "but its tensors need"),
    "a size that is not the shape's": ({"a": line((3,))}, "entry of the tensor 'a'"),
    "a huge shape": ({"a": line((1 << 40, 1 << 40))}, "entry of the tensor 'a'"),
    "a negative shape": ({"a": line((-2,))}, "entry of the tensor 'a'"),
    "a shape of booleans": ({"a": line((True, 2))}, "entry of the tensor 'a'"),
    "an unknown type": ({"a": line(dtype="Q4")}, "'a' has the dtype 'Q4'"),
    "a tensor of no elements": ({"a": line((0,), (0, 0))}, "entry of the tensor 'a'"),
    "an axis beside a zero": (
        {"a": line((0, 1 << 61), (0, 0)), "b": line()},
        "entry of the tensor 'a'",
    ),
    "nine axes": ({"a": line((1,) * 8 + (2,))}, "entry of the tensor 'a'"),
    "a path for a name": ({"../etc\\x": line()}, "'../etc.*x' is not a valid"),
    "no name": ({"": line()}, "'' is not a valid tensor name"),
    "a name of a megabyte": ({"a" * 1000: line()}, "is not a valid tensor name"),
    "not a number": (
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        "NaN is not a JSON",
    ),
    "too many tensors": (
        {f"t{n}": line((1,), (n, n + 1), "U8") for n in range(10_001)},
        "it has 10,001 tensors",
    ),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, "metadata is not"),
    "a line more": ({"a": line() | {"x": 1}}, "entry of the tensor 'a'"),
    "a line that is none": ({"a": 3}, "entry of the tensor 'a'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_not_safetensors_are_refused(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "x.safetensors").write_bytes(data)

    with pytest.raises(ModelError, match=message):
        open_safetensors([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("name", LINES)
def test_headers_that_are_not_exact_are_refused(name, tmp_path):
    header, message = LINES[name]
    crafted(tmp_path / "x.safetensors", header, bytes(8))

    with pytest.raises(ModelError, match=message):
        open_safetensors([tmp_path / "x.safetensors"])


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        open_safetensors([tmp_path / "x.safetensors"])


def test_every_truncation_is_noticed(path):
    data = path.read_bytes()

    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match="cannot use"):
            open_safetensors([path])


def test_a_file_cut_after_it_was_opened_is_noticed(path):
    found = open_safetensors([path])
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ModelError, match="ends inside the tensor"):
        [found.read(name) for name in found.tensors]


def test_mutated_headers_raise_nothing_else(path):
    data = path.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)

    for _ in range(3000):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            mutant[rng.integers(length)] = rng.integers(256)
        path.write_bytes(mutant)
        try:
            found = open_safetensors([path])
        except ModelError:
            continue
        for name in found.tensors:
            found.read(name)
