"""Exports are read back bit for bit, and imports are checked."""

import dataclasses
import re
import resource

import jax
import numpy as np
import pytest
import safetensors.numpy

import gptjax
from gptjax.cli.main import main
from gptjax.errors import ConfigError, ModelError
from gptjax.exporters import export
from gptjax.exporters.export import GGUF_DTYPES, export_model
from gptjax.exporters.tensors import named_tensors
from gptjax.presets import LLAMA_OPTIONS
from gptjax.tokenizer.chat_template import load_chat_template
from tests.build_openai_fixture import FOLDER, arrays
from tests.small_models import assert_same, make_model
from tests.tokenizer.test_vocab_files import OWN

# Replaced in this order, they turn names into those of Hugging Face.
OPENAI_NAMES = {"model/": "", "wte": "wte.weight", "wpe": "wpe.weight", "h0": "h.0", "h1": "h.1"}
OPENAI_NAMES |= {"/w": ".weight", "/g": ".weight", "/b": ".bias", "/": "."}
BOOK_NAMES = {
    **{"trf_blocks": "h", "norm1": "ln_1", "norm2": "ln_2", "final_norm": "ln_f"},
    **{"scale": "weight", "shift": "bias", "tok_emb": "wte", "pos_emb": "wpe", "out_head": "wte"},
    **{"att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"},
    **dict.fromkeys(("att.W_query", "att.W_key", "att.W_value"), "attn.c_attn"),
}

LLAMA = LLAMA_OPTIONS | {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "mlp_dim": 40}
LLAMA |= {"rope_theta": 5e5, "rope_factor": 32.0, "rope_original_context": 4}
LLAMA |= {"context_length": 131_072}  # of which there is no table
QWEN = LLAMA | {"rope_factor": 1.0, "rope_original_context": 8192, "qk_norm": True}
QWEN |= {"tie_embeddings": False, "norm_eps": 1e-6}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("hf", LLAMA),
        ("hf", QWEN),
        ("hf", {"mlp_dim": 40, "norm_eps": 1e-6}),
        ("hf", {"tie_embeddings": False, "n_heads": 1, "vocab_multiple": 64}),
        ("book", {"vocab_multiple": 64}),
        ("book", {"tie_embeddings": False, "qkv_bias": False}),
    ],
)
def test_exports_are_imported_bit_for_bit(layout, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "compare_logits", lambda *models: 0.0)  # compiles
    model = make_model(**shape)

    export_model(model, layout, tmp_path / "out")

    loaded = gptjax.load(tmp_path / "out")
    if "vocab_multiple" in shape:  # rows that pad the vocabulary are not exported
        params = {
            name: {"embedding": subtree["embedding"][:257]} if "embedding" in subtree else subtree
            for name, subtree in model.params.items()
        }
        config = dataclasses.replace(model.config, vocab_multiple=1)
        model = dataclasses.replace(model, config=config, params=params)
    assert_same(loaded, model)


def rename(name, names):
    for old, new in names.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
@pytest.mark.parametrize(
    "shape",
    [QWEN, QWEN | {"qk_norm": False}, {"tie_embeddings": False}],
    ids=["qwen3", "llama", "gpt2"],
)
def test_a_gguf_file_is_read_back_up_to_rounding(shape, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "compare_logits", lambda *models: 0.0)  # compiles
    template = load_chat_template("chatml").source
    model = make_model(**shape | {"d_model": 32})
    model = dataclasses.replace(model, chat_template=template)

    export_model(model, "gguf", tmp_path / "out", dtype)

    loaded = gptjax.load(tmp_path / "out" / f"model-{dtype}.gguf")
    assert loaded.config == dataclasses.replace(model.config, dtype=loaded.config.dtype)
    assert loaded.tokenizer.hash == model.tokenizer.hash
    assert loaded.chat_template == template
    errors = jax.tree.map(lambda a, b: float(abs(a - b).max()), model.params, loaded.params)
    largest = max(jax.tree.leaves(errors))
    assert largest == 0 if dtype == "f32" else 0 < largest < 4e-3


@pytest.mark.parametrize("count", [3, 4])
def test_end_tokens_beyond_those_of_a_gguf_file_are_reported(count, tmp_path):
    ids = {f"<stop_{n}>": 264 + n for n in range(count - 1)}
    tokenizer = dataclasses.replace(OWN, added_tokens=ids, stop_tokens=tuple(ids.values()))

    summary = export_model(make_model(tokenizer=tokenizer), "gguf", tmp_path / "out")

    loaded = gptjax.load(tmp_path / "out" / "model-f16.gguf")
    assert loaded.tokenizer.stop_ids == tokenizer.stop_ids[:3]
    assert ("not exported: stop tokens" in summary) == (count > 3)


@pytest.mark.parametrize(("dtype", "size"), [("f16", 7e4), ("bf16", 3.4e38)])
def test_values_beyond_the_range_of_a_type_are_rejected_with_another(dtype, size, tmp_path):
    model = make_model()
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(size), model.params)

    with pytest.raises(ModelError, match="--dtype f32"):
        export_model(dataclasses.replace(model, params=params), "gguf", tmp_path / "out", dtype)


def test_tensors_of_all_layouts_are_the_same_numbers():
    model = gptjax.load(FOLDER)
    hf, book = (named_tensors(model, layout) for layout in ("hf", "book"))

    openai = {rename(name, OPENAI_NAMES): np.squeeze(array) for name, array in arrays().items()}
    assert hf.keys() == openai.keys()
    assert {rename(name, BOOK_NAMES) for name in book} == hf.keys()
    for name, tensor in hf.items():
        np.testing.assert_array_equal(tensor, openai[name], err_msg=name)
    key = np.split(hf["h.1.attn.c_attn.weight"], 3, axis=1)[1]
    kernel = np.ravel(model.params["blocks"]["attention"]["key"]["kernel"][1])
    np.testing.assert_array_equal(kernel, np.ravel(key))
    without_bias = named_tensors(make_model(qkv_bias=False), "hf")
    np.testing.assert_array_equal(without_bias["h.1.attn.c_attn.bias"], np.zeros(48))
    for name, tensor in book.items():
        expected = hf[rename(name, BOOK_NAMES)]
        for n, part in enumerate(("W_query", "W_key", "W_value")):
            if part in name:
                expected = np.split(expected, 3, axis=-1)[n]
        if ".att." in name or ".ff." in name:  # PyTorch: [output, input]
            expected = expected.T
        np.testing.assert_array_equal(tensor, expected, err_msg=name)


def test_tensors_of_qwen_have_the_names_and_axes_of_transformers():
    model = make_model(n_layers=1, **QWEN)

    tensors = named_tensors(model, "llama")

    names = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (16,))
    names |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (6,))
    names |= {"self_attn.q_proj": (24, 16), "self_attn.o_proj": (16, 24)}
    names |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (12, 16))
    names |= {"mlp.gate_proj": (40, 16), "mlp.up_proj": (40, 16), "mlp.down_proj": (16, 40)}
    names = {f"layers.0.{name}": shape for name, shape in names.items()}
    names |= {"embed_tokens": (257, 16), "norm": (16,), "lm_head": (257, 16)}
    assert {n.removesuffix(".weight"): x.shape for n, x in tensors.items()} == names
    attention = model.params["blocks"]["attention"]
    for name, shape in {"query": (16, 24), "key": (16, 12), "out": (24, 16)}.items():
        tensor = tensors[f"layers.0.self_attn.{name[0]}_proj.weight"]
        kernel = np.asarray(attention[name]["kernel"][0])
        np.testing.assert_array_equal(tensor, kernel.reshape(shape).T)


def test_weights_in_bfloat16_stay_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "compare_logits", lambda *models: 0.0)  # compiles
    model = make_model(n_layers=1, **LLAMA)
    params = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), model.params)
    for n, (values, dtype) in enumerate(((params, "bfloat16"), (model.params, "float32"))):
        export_model(dataclasses.replace(model, params=values), "hf", tmp_path / str(n))
        tensors = safetensors.numpy.load_file(tmp_path / str(n) / "model.safetensors")
        assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
        assert_same(gptjax.load(tmp_path / str(n)), dataclasses.replace(model, params=values))


def test_an_export_must_reproduce_the_logits(model, tmp_path, monkeypatch):
    assert "differ by at most 0" in export_model(model, "hf", tmp_path / "right")

    tensors = named_tensors(model, "hf")
    tensors["h.0.attn.c_proj.weight"] = tensors["h.0.attn.c_proj.weight"] * 1.001
    monkeypatch.setattr("gptjax.exporters.hf.named_tensors", lambda *arguments: tensors)
    with pytest.raises(ModelError, match="logits"):
        export_model(model, "hf", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


UNKNOWN_ARCHITECTURES = [{"norm": "rms", "bias": False}, LLAMA | {"mlp": "relu2"}, {"mlp_dim": 40}]


def test_impossible_exports_are_errors_and_leave_nothing(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    nan = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    labeled = dataclasses.replace(model, labels=("a", "b", "c"))
    modern = [make_model(n_layers=1, **changes) for changes in UNKNOWN_ARCHITECTURES]
    two_way = dataclasses.replace(labeled, config=dataclasses.replace(model.config, causal=False))
    for exported, layout, folder, error, message in [
        (model, "hff", "out", ConfigError, "'hff'"),
        (model, "hf", "full", ModelError, "full"),
        (dataclasses.replace(model, params=nan), "hf", "out", ModelError, "non-finite"),
        (labeled, "book", "out", ModelError, "--to hf"),
        (labeled, "gguf", "out", ModelError, "--to hf"),
        (two_way, "hf", "out", ModelError, "model.causal=False"),
        (modern[0], "hf", "out", ModelError, r"GPT-2.*model\.norm=rms .*model\.bias=False"),
        (modern[1], "hf", "out", ModelError, r"Llama.*model\.mlp=relu2"),
        (modern[2], "book", "out", ModelError, r"model\.mlp_dim=40"),
    ]:
        with pytest.raises(error, match=message):
            export_model(exported, layout, tmp_path / folder)

    assert [path.name for path in tmp_path.rglob("*")] == ["full", "x"]


def test_an_export_that_exceeds_a_limit_of_the_disk_is_one_sentence(model, tmp_path, capsys):
    gptjax.save(model, tmp_path / "own")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        command = f"export {tmp_path}/own --to hf --out {tmp_path}/out"
        assert main(command.split()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert re.fullmatch(r"gptjax: .*model\.safetensors.*ulimit -f.*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_classifier_is_exported_with_its_labels(tmp_path):
    model = make_model(n_classes=3, tie_embeddings=False, n_layers=1, dropout=0.5)
    model = dataclasses.replace(model, labels=("a", "b", "c"))

    *_, lost = export_model(model, "hf", tmp_path / "out").splitlines()
    loaded = gptjax.load(tmp_path / "out")

    assert lost == "not exported: model.dropout, model.tie_embeddings"
    assert loaded.labels == ("a", "b", "c")
    assert loaded.config.tie_embeddings  # no head for tokens is exported
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], model.params["head"]["kernel"])
