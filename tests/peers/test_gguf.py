"""GGUF files of the package gguf are read bit for bit.

Run with `pytest -m peers -n0 tests/peers/test_gguf.py`; needs the extra [peers].
"""

import numpy as np
import pytest

from gptjax.weights.gguf import BLOCK_DTYPES, open_gguf

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


def test_tensors_and_metadata_are_those_of_the_package_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "Ġb", "ü"])
    writer.add_token_types([1, 3, 1])
    writer.add_add_bos_token(False)
    numbers = np.random.default_rng(0).normal(0, 0.3, (64, 96)).astype(np.float32)
    for name in BLOCK_DTYPES:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata, reader = open_gguf(path)

    assert metadata["llama.context_length"] == 8192
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert metadata["tokenizer.ggml.tokens"] == ["a", "Ġb", "ü"]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [1, 3, 1]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert reader.tensors.keys() == theirs.keys() == BLOCK_DTYPES.keys()
    for name, tensor in theirs.items():
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        np.testing.assert_array_equal(
            reader.read(name).view(np.int32), expected.view(np.int32), strict=True
        )
