"""Safetensors files are read exactly, or rejected with one clear error."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gptjax.errors import ModelError
from gptjax.weights.safetensors import open_safetensors

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(12, dtype=np.float16).reshape(2, 3, 2),
    "c": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3, np.float32),
    "mask": np.tril(np.ones((4, 4), bool)),
}


@pytest.fixture
def path(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.fast
def test_tensors_are_those_that_the_library_wrote(path, tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"d": np.ones(2, np.float32)}, other)

    found = open_safetensors([path, other])

    assert set(found.tensors) == {*ARRAYS, "d"}
    for name, array in ARRAYS.items():
        read = found.read(name)
        assert (read.shape, read.dtype, read.tobytes()) == (
            array.shape,
            array.dtype,
            array.tobytes(),
        )
    with pytest.raises(ModelError, match="the tensor a"):
        open_safetensors([path, path])
    with pytest.raises(ModelError, match="none"):
        open_safetensors([tmp_path / "none.safetensors"])


def raw(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}


INVALID_FILES = [
    (raw(b"", 1 << 62), "4,611,686,018,427,387,904"),
    (raw(b" " * ((1 << 20) + 1)), "1,048,577"),
    (raw(b"{}", 100), "header of 100"),
    (b"", "file of 0"),
    (raw(b'"\xff"'), "utf-8"),
    (raw(b"[]"), "object"),
    (raw(b"[" * 200_000), "64"),
    (raw(b'{"a":1,"a":1}'), "duplicate"),
]
INVALID_HEADERS = [
    ({"a": entry(offsets=(4, 12))}, "starts at byte"),  # a gap
    ({"a": entry(), "b": entry(offsets=(4, 12))}, "starts at byte"),  # an overlap
    ({"a": entry((4,), (0, 16))}, "tensors need"),
    ({"a": entry((1,), (0, 4))}, "tensors need"),
    ({"a": entry((3,))}, "tensor 'a'"),
    ({"a": entry((1 << 40, 1 << 40))}, "tensor 'a'"),
    ({"a": entry((-2,))}, "tensor 'a'"),
    ({"a": entry((True, 2))}, "tensor 'a'"),
    ({"a": entry(dtype="Q4")}, "'a' has the dtype 'Q4'"),
    ({"a": entry((0,), (0, 0)), "b": entry()}, "tensor 'a'"),
    ({"a": entry((1,) * 8 + (2,))}, "tensor 'a'"),
    ({"../etc\\x": entry()}, "'../etc"),
    ({"a" * 1000: entry()}, "aaa"),
    ({f"t{n}": entry((1,), (n, n + 1), "U8") for n in range(10_001)}, "10,000"),
    ({"__metadata__": {"x": 1}}, "metadata"),
    ({"a": entry() | {"x": 1}}, "tensor 'a'"),
    ({"a": 3}, "tensor 'a'"),
]


def test_invalid_files_are_rejected(tmp_path):
    path = tmp_path / "x.safetensors"
    headers = [(raw(json.dumps(h).encode()) + bytes(8), message) for h, message in INVALID_HEADERS]

    for data, message in INVALID_FILES + headers:
        path.write_bytes(data)
        with pytest.raises(ModelError, match=f"{path}.*{message}"):
            open_safetensors([path])


def test_truncated_files_are_errors_also_after_they_were_opened(path):
    data, found = path.read_bytes(), open_safetensors([path])

    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=str(path)):
            open_safetensors([path])
    with pytest.raises(ModelError, match=str(path)):
        [found.read(name) for name in found.tensors]
