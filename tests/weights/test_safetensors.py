"""Safetensors files are read exactly, or rejected with one clear error."""

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


@pytest.mark.fast
def test_tensors_are_those_that_the_library_wrote(arrays, path, tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"d": np.ones(2, np.float32)}, other)

    found = open_safetensors([path, other])

    assert set(found.tensors) == {*arrays, "d"}
    for name, array in arrays.items():
        info = found.tensors[name]
        assert (info.shape, info.dtype) == (array.shape, array.dtype)
        assert found.read(name).tobytes() == array.tobytes()
    with pytest.raises(ModelError, match="the tensor a"):
        open_safetensors([path, path])


def raw(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}


INVALID_FILES = {
    "huge header": (raw(b"", 1 << 62), "4,611,686,018,427,387,904"),
    "header above the limit": (raw(b" " * ((1 << 20) + 1)), "1,048,577"),
    "header not UTF-8": (raw(b'"\xff"'), "utf-8"),
    "header longer than the file": (raw(b"{}", 100), "header of 100"),
    "empty": (b"", "file of 0"),
    "not JSON": (raw(b"abc"), "Expecting value"),
    "a list": (raw(b"[]"), "object"),
    "deep nesting": (raw(b"[" * 200_000), "64"),
    "duplicate name": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)) + bytes(8),
        "duplicate",
    ),
    "not a number": (
        raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}') + bytes(8),
        "NaN",
    ),
}
INVALID_HEADERS = {
    "gap": ({"a": entry(offsets=(4, 12))}, "starts at byte"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "starts at byte"),
    "more than the file": ({"a": entry((4,), (0, 16))}, "tensors need"),
    "less than the file": ({"a": entry((1,), (0, 4))}, "tensors need"),
    "size of another shape": ({"a": entry((3,))}, "tensor 'a'"),
    "huge shape": ({"a": entry((1 << 40, 1 << 40))}, "tensor 'a'"),
    "negative shape": ({"a": entry((-2,))}, "tensor 'a'"),
    "booleans in shape": ({"a": entry((True, 2))}, "tensor 'a'"),
    "unknown dtype": ({"a": entry(dtype="Q4")}, "'a' has the dtype 'Q4'"),
    "no elements": ({"a": entry((0,), (0, 0)), "b": entry()}, "tensor 'a'"),
    "nine axes": ({"a": entry((1,) * 8 + (2,))}, "tensor 'a'"),
    "path as name": ({"../etc\\x": entry()}, "'../etc"),
    "empty name": ({"": entry()}, "''"),
    "long name": ({"a" * 1000: entry()}, "aaa"),
    "too many tensors": ({f"t{n}": entry((1,), (n, n + 1), "U8") for n in range(10_001)}, "10,000"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, "metadata"),
    "unknown field": ({"a": entry() | {"x": 1}}, "tensor 'a'"),
    "entry not an object": ({"a": 3}, "tensor 'a'"),
}


def test_invalid_files_are_rejected(tmp_path):
    path = tmp_path / "x.safetensors"
    cases = INVALID_FILES | {
        name: (raw(json.dumps(header).encode()) + bytes(8), message)
        for name, (header, message) in INVALID_HEADERS.items()
    }

    for name, (data, message) in cases.items():
        path.write_bytes(data)
        try:
            with pytest.raises(ModelError, match=message) as error:
                open_safetensors([path])
        except BaseException as failure:
            failure.add_note(name)
            raise
        assert str(path) in str(error.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        open_safetensors([tmp_path / "x.safetensors"])


def test_every_truncation_is_an_error(path):
    data, found = path.read_bytes(), open_safetensors([path])

    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=str(path)):
            open_safetensors([path])
    with pytest.raises(ModelError, match=str(path)):  # cut after it was opened
        [found.read(name) for name in found.tensors]


def test_mutated_headers_raise_no_other_error(path):
    data = path.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)

    for _ in range(500):
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
