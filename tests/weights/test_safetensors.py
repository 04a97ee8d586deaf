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


def test_tensors_of_several_files_are_read_exactly(path, tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"d": np.ones(2, np.float32)}, other)

    found = open_safetensors([path, other])

    assert set(found.tensors) == {*ARRAYS, "d"}
    for name, array in ARRAYS.items():
        read, info = found.read(name), found.tensors[name]
        assert (info.shape, info.dtype, read.dtype) == (array.shape, array.dtype, array.dtype)
        np.testing.assert_array_equal(read, array, strict=True)
    with pytest.raises(ModelError, match="the tensor a"):
        open_safetensors([path, path])


def test_invalid_headers_are_rejected(tmp_path):
    path = tmp_path / "x.safetensors"
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

    for header, message in [
        (b"", ""),
        (b" " * ((1 << 20) + 1), "1,048,577"),
        ({"a": good | {"data_offsets": [4, 12]}}, ""),  # a gap
        ({"a": good | {"shape": [1 << 40, 1 << 40]}}, ""),
        ({"a": good | {"dtype": "F8_E4M3", "shape": [8]}}, "a has the dtype F8_E4M3"),
    ]:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        with pytest.raises(ModelError, match=f"{path}.*{message}"):
            open_safetensors([path])


def test_truncated_files_are_errors_also_after_they_were_opened(path):
    data, found = path.read_bytes(), open_safetensors([path])

    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=str(path)):
            open_safetensors([path])
        with pytest.raises(ModelError, match=str(path)):
            found.read("a")
