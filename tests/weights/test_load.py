"""Models of all layouts load with the same numbers, and nothing else loads."""

import dataclasses
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, ModelError
from gptjax.exporters import export
from gptjax.exporters.tensors import named_tensors
from gptjax.presets import LLAMA_OPTIONS
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tree import flatten_with_names
from gptjax.weights.foreign_config import hf_config
from gptjax.weights.load import REFERENCE_VALUES, ReferenceValues, convert_model, load
from gptjax.weights.safetensors import write_safetensors
from tests.build_openai_fixture import FOLDER
from tests.runs import capture_lines
from tests.small_models import assert_same, change, change_config, make_model


def test_names_without_prefix_buffers_and_rows_without_a_token_are_accepted(hf, model):
    def edit(arrays):
        plain = {n.removeprefix("transformer."): a for n, a in arrays.items()}
        plain["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        plain["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(1)
        plain["wte.weight"] = np.concatenate([plain["wte.weight"], np.ones((3, 16), np.float32)])
        return plain

    change(hf, edit)
    change_config(hf, vocab_size=260)
    lines = []

    with capture_lines(lines):
        assert_same(load(hf), model)
    assert "3 rows" in lines[0]


def test_other_precisions_become_float32(hf, model):
    change(hf, lambda arrays: {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()})

    for name, leaf in flatten_with_names(gptjax.load(hf).params).items():
        expected = np.asarray(flatten_with_names(model.params)[name]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(leaf, expected.astype(np.float32), strict=True)


def test_files_with_an_index_are_one_model(hf, model):
    arrays = safetensors.numpy.load_file(hf / "model.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for n, file in enumerate(files):
        part = {name: arrays[name] for name in sorted(arrays)[n::2]}
        safetensors.numpy.save_file(part, hf / file)
    (hf / "model.safetensors").unlink()
    weight_map = {str(n): file for n, file in enumerate(files)}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert_same(gptjax.load(hf), model)


def test_a_book_file_needs_the_number_of_heads_unless_they_are_64_wide(tmp_path):
    wide, narrow = make_model(d_model=128, n_layers=1, tie_embeddings=False), make_model()
    for model, path in ((wide, tmp_path / "x.safetensors"), (narrow, tmp_path / "y.safetensors")):
        write_safetensors(named_tensors(model, "book"), path)

    assert_same(gptjax.load(tmp_path / "x.safetensors"), wide)
    with pytest.raises(ModelError, match=r'\{"n_heads": 12\}'):
        gptjax.load(tmp_path / "y.safetensors")


def replace_tensor(name, edit):
    return lambda arrays: arrays.update({name: np.ascontiguousarray(edit(arrays[name]))})


TEMPLATE = load_chat_template("qa").source
LN_2 = "transformer.h.1.ln_2.bias"
ONES = np.ones(16, np.float32)
INVALID_TENSORS = [
    (lambda a: a.__delitem__(LN_2), "lacks 1 .* h.1.ln_2.bias"),
    (lambda a: a.update({"transformer.h.2.ln_2.bias": ONES}), "1 .*h.2.ln_2.bias"),
    (lambda a: a.update({"ln_f.bias": ONES}), "both"),
    (replace_tensor("transformer.h.0.mlp.c_fc.weight", np.transpose), r"\(64, 16\).* \(16, 64\)"),
    (replace_tensor("transformer.h.0.ln_1.weight", lambda a: a.view(np.int32)), "int32"),
    (replace_tensor(LN_2, lambda a: a * np.nan), "h.1.ln_2.bias"),
    (replace_tensor(LN_2, lambda a: np.full(16, -1e300)), "h.1.ln_2.bias"),
]
INVALID_CONFIGS = [
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"model_type": "mamba"}, "model_type='mamba'"),
    ({"model_type": ["gpt2"]}, r"model_type=\['gpt2'"),
    ({"n_inner": 3}, r"\(3, 16\)"),
    ({"layer_norm_epsilon": "1"}, "layer_norm_epsilon='1'"),
    ({"n_layer": 9_999}, "n_layers=9999"),
    ({"n_head": "2"}, "n_head='2'"),
    ({"vocab_size": 200}, "257 tokens.* 200"),
    ({"n_positions": 1 << 40, "n_ctx": 1 << 40}, "context_length=1099511627776"),
    ({"n_ctx": 7}, "n_ctx=7"),
    ({"rope_theta": 1e4}, r"rope_theta=10000\.0"),
    ({"pruned_heads": {"1": [0]}}, "pruned_heads={'1': "),
    ({"eos_token_id": 65}, "eos_token_id=65"),
    ({"eos_token_id": "256"}, "eos_token_id='256'"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id={'a': 1}"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings=0"),
]
INVALID_CLASSES = [
    ({"id2label": {"0": "a", "2": "c"}}, "id2label"),
    ({"id2label": {"0": "LABEL_0"}}, "num_labels=1"),
    ({"id2label": None, "num_labels": 1}, "num_labels=1"),
    ({"id2label": None, "num_labels": 10**9}, "num_labels=1000000000"),
    ({"num_labels": 2}, "num_labels=2"),
    ({"problem_type": "multi_label_classification"}, "problem_type='multi_label"),
    ({"pad_token_id": 33}, "pad_token_id=33"),
]


def test_tensors_and_configs_of_another_model_are_rejected(hf):
    weights, config = hf / "model.safetensors", hf / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for edit, message in INVALID_TENSORS:
        weights.write_bytes(whole)
        change(hf, edit)
        with pytest.raises(ModelError, match=message):
            gptjax.load(hf)
    weights.write_bytes(whole)
    for values, message in INVALID_CONFIGS:
        config.write_text(text)
        change_config(hf, **values)
        with pytest.raises(ModelError, match=message):
            gptjax.load(hf)
    config.write_text(text)
    generation_config = hf / "generation_config.json"
    generation_config.write_text('{"eos_token_id": [10, 256]}')  # 10 is a line break
    with pytest.raises(ModelError, match="eos_token_id=10 "):
        gptjax.load(hf)
    generation_config.write_text('{"eos_token_id": [256, 50256]}')  # no token of the model
    assert gptjax.load(hf).tokenizer.stop_ids == [256]
    tokenizer_config = hf / "tokenizer_config.json"
    tokenizer_config.write_text('{"add_bos_token": "true"}')
    with pytest.raises(ModelError, match="add_bos_token='true'"):
        gptjax.load(hf)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 257,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SCALED = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 16}
SCALED |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_configs_of_llama_and_qwen_have_the_names_of_all_versions_of_transformers():
    shape = {"vocab_size": 257, "context_length": 64, "n_layers": 2, "n_heads": 4, "d_model": 32}
    expected = GPTConfig(**shape, n_kv_heads=2, mlp_dim=48, norm_eps=1e-6, **LLAMA_OPTIONS)
    scaled = dataclasses.replace(
        expected, rope_theta=5e5, rope_factor=32.0, rope_original_context=16
    )

    assert hf_config(LLAMA) == hf_config(LLAMA | {"head_dim": 8}) == expected
    old = {"rope_theta": 500_000, "rope_scaling": SCALED}
    oldest = old | {"rope_scaling": {"type" if n == "rope_type" else n: SCALED[n] for n in SCALED}}
    new = {"rope_parameters": SCALED | {"rope_theta": 500_000.0}}
    for values in (old, oldest, new, old | new):
        assert hf_config(LLAMA | values) == scaled
    qwen = hf_config(LLAMA | {"model_type": "qwen3", "num_key_value_heads": None})
    assert (qwen.qk_norm, qwen.head_dim, qwen.n_kv_heads) == (True, 128, 0)
    assert hf_config(LLAMA | {"intermediate_size": 128}).mlp_dim == 0
    assert not hf_config(
        {n: v for n, v in LLAMA.items() if n != "tie_word_embeddings"}
    ).tie_embeddings


# Keys of config.json in HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B and
# Qwen/Qwen3-0.6B that differ between them.
SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
SIZES += ("hidden_size", "intermediate_size", "max_position_embeddings", "vocab_size")
PUBLIC = {
    "smollm2-135m": (30, 9, 3, 64, 576, 1536, 8192, 49_152),
    "llama3.2-1b": (16, 32, 8, 64, 2048, 8192, 131_072, 128_256),
    "qwen3-0.6b": (28, 16, 8, 128, 1024, 3072, 40_960, 151_936),
}
OTHERS = {
    "smollm2-135m": {"rope_theta": 100_000, "rope_interleaved": False, "is_llama_config": True},
    "llama3.2-1b": {
        "rope_theta": 500_000.0,
        "rope_scaling": SCALED | {"original_max_position_embeddings": 8192},
    },
    "qwen3-0.6b": {
        **{"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000},
        **{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
    },
}


def test_presets_are_the_public_configs():
    for name, values in PUBLIC.items():
        public = LLAMA | {"rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "rope_scaling": None}
        public |= dict(zip(SIZES, values, strict=True)) | OTHERS[name]
        assert hf_config(public) == GPTConfig.preset(name), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3"),
        ({"head_dim": 7}, "7 dimensions"),
        ({"head_dim": -1}, "head_dim='-1'"),
        ({"hidden_size": None}, "hidden_size='None'"),
        ({"rms_norm_eps": True}, "rms_norm_eps='True'"),
        ({"rope_theta": 10**400}, "rope_theta='1000"),
        ({"rope_parameters": 3}, "3 are not a table"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, r"rope_theta=100000\.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"rope_scaling": SCALED | {"low_freq_factor": 2}}, "low_freq_factor=2"),
        ({"rope_scaling": SCALED | {"high_freq_factor": 8}}, "high_freq_factor=8"),
        ({"rope_scaling": SCALED | {"factor": None}}, "factor='None'"),
        ({"rope_scaling": SCALED | {"original_max_position_embeddings": 0}}, "original_max.*'0'"),
        ({"rope_scaling": SCALED | {"beta_fast": 32}}, "beta_fast=32"),
    ],
)
def test_other_architectures_than_llama_are_rejected_by_key_and_value(values, message):
    with pytest.raises(ConfigError, match=message):
        hf_config(LLAMA | values)


def test_a_classifier_of_transformers_chooses_one_of_its_classes(tmp_path):
    model = dataclasses.replace(make_model(n_classes=3, n_layers=1), labels=("a", "b", "c"))
    with pytest.MonkeyPatch.context() as patch:  # compiles
        patch.setattr(export, "compare_logits", lambda *models: 0.0)
        export.export_model(model, "hf", tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    text = config.read_text()

    for values, message in INVALID_CLASSES:
        config.write_text(text)
        change_config(tmp_path / "hf", **values)
        with pytest.raises(ModelError, match=message):
            gptjax.load(tmp_path / "hf")
    change_config(tmp_path / "hf", num_labels=3, id2label=None, pad_token_id=None)
    assert gptjax.load(tmp_path / "hf").labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_added_tokens_have_rows_and_keep_them(hf, tmp_path):
    def add_rows(arrays):
        table = arrays["transformer.wte.weight"]
        arrays["transformer.wte.weight"] = np.concatenate([table, table[:2]])

    change(hf, add_rows)
    change_config(hf, vocab_size=259)
    ids = json.loads((hf / "vocab.json").read_text())
    for tokens, num_cut in ((["[PAD]", "<|im_end|>"], 0), (["[PAD]", "<|im_end|>", "[X]"], 1)):
        added = {token: 257 + n for n, token in enumerate(tokens)}
        (hf / "vocab.json").write_text(json.dumps(ids | added))
        special = {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": tokens}
        (hf / "tokenizer_config.json").write_text(json.dumps(special))
        lines = []
        with capture_lines(lines):
            loaded = load(hf)
        assert loaded.tokenizer.added_tokens == {"[PAD]": 257, "<|im_end|>": 258}
        assert (loaded.config.vocab_size, len(lines)) == (259, num_cut)
    gptjax.save(loaded, tmp_path / "own")
    assert_same(gptjax.load(tmp_path / "own"), loaded)


def test_a_template_in_the_tokenizer_config_is_used(hf, caplog):
    caplog.set_level("INFO", "gptjax")
    source = load_chat_template("qa").source
    for value in (
        source,
        [{"name": "tools", "template": "x"}, {"name": "default", "template": source}],
    ):
        (hf / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert gptjax.load(hf).chat_template == source
    for value in (5, [5], [{"name": "default", "template": None}]):
        (hf / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert not gptjax.load(hf).chat_template
        assert f"chat template not used: chat_template={value!r}"[:70] in caplog.text


@pytest.mark.parametrize("layout", ["own", "hf", "openai"])
def test_a_pipe_or_device_in_place_of_any_file_is_an_error(layout, hf, model, tmp_path):
    folder = {"hf": hf, "openai": tmp_path / "openai", "own": tmp_path / "own"}[layout]
    if layout == "own":
        gptjax.save(dataclasses.replace(model, chat_template=TEMPLATE), folder)
    if layout == "openai":
        shutil.copytree(FOLDER, folder)
    unread = ("README.md", "generation_config.json", "checkpoint", "model.ckpt.meta")
    for path in [path for path in folder.iterdir() if path.name not in unread]:
        path.rename(tmp_path / "moved")
        for replace in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
            replace(path)
            with pytest.raises(ModelError, match=str(folder)):
                gptjax.load(folder)
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "moved").rename(path)


def test_paths_without_a_model_are_errors_and_pickles_come_with_code_that_converts_them(tmp_path):
    with pytest.raises(ModelError, match=f"no model '{tmp_path}'"):
        gptjax.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}")
    for source in (tmp_path / "pytorch_model.bin", tmp_path):
        with pytest.raises(ModelError, match="pickle") as error:
            gptjax.load(source)
        compile("\n".join(map(str.strip, str(error.value).splitlines()[1:])), "advice", "exec")


def test_saving_replaces_a_model_and_nothing_else(model, tmp_path):
    folder = tmp_path / "own"
    gptjax.save(model, folder)
    others = {"notes.txt", ".cache", "link"}
    (folder / "notes.txt").write_text("good")
    (folder / ".cache").mkdir()
    (folder / "link").symlink_to("missing")
    gptjax.save(model, folder)
    assert others < {path.name for path in folder.iterdir()}
    assert (folder / "notes.txt").read_text() == "good"
    assert_same(gptjax.load(folder), model)

    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"own has '\.cache'"):
        gptjax.save(model, folder)
    assert (folder / "notes.txt").exists()


def test_a_model_that_cannot_be_loaded_again_is_not_saved(model, tmp_path):
    scale = model.params["final_norm"]["scale"]
    for value, named in (
        (scale.at[0].set(np.nan), "final_norm/scale contains"),
        (scale.at[3].set(-np.inf), "final_norm/scale contains"),
        (scale[1:], r"final_norm/scale has shape \(15,\)"),
    ):
        params = {**model.params, "final_norm": {**model.params["final_norm"], "scale": value}}
        with pytest.raises(ModelError, match=named):
            gptjax.save(dataclasses.replace(model, params=params), tmp_path / "own")
    with pytest.raises(ModelError, match=r"labels=\('a',\)"):
        gptjax.save(dataclasses.replace(model, labels=("a",)), tmp_path / "own")
    assert not any(tmp_path.iterdir())


def test_files_of_another_program_beside_a_model_are_not_those_of_a_run(model, tmp_path):
    for name, others in (("own", ["config.toml", "meta.json"]), ("model", ["config.toml"])):
        gptjax.save(model, tmp_path / name / name)
        for other in others:
            (tmp_path / name / other).write_text("not = [toml")

        assert_same(gptjax.load(tmp_path / name / name), model)


def test_model_folders_of_early_versions_are_read_and_invalid_ones_rejected(model, tmp_path):
    gptjax.save(model, tmp_path / "own")
    assert_same(gptjax.load(tmp_path / "own"), model)
    shape, path = dataclasses.asdict(model.config), tmp_path / "own" / "config.json"
    text = path.read_text()
    change_config(tmp_path / "own", model=shape | {"attention": "blockwise"})
    assert gptjax.load(tmp_path / "own").config.attention == "flash"

    for values, message in [
        ({"format": "gptjax-9"}, "gptjax-9"),
        ({"model": {"n_heds": 2}}, "n_heads"),
        ({"model": shape | {"vocab_multiple": 50_000}}, "vocab_multiple=50000"),
        ({"labels": ["a", "b"]}, "labels=.*for 0 classes"),
        ({"tokenizer": {"name": "bytes", "hash": "0" * 64}}, "000000000000"),
    ]:
        path.write_text(text)
        change_config(tmp_path / "own", **values)
        with pytest.raises(ModelError, match=message):
            gptjax.load(tmp_path / "own")


def test_an_import_keeps_the_template_and_is_compared_with_published_values(
    hf, model, tmp_path, monkeypatch
):
    table = np.asarray(model.params["token_embedding"]["embedding"])
    right = ReferenceValues(10_832, (*table[0, :3], table[-1, -1]))
    monkeypatch.setattr("gptjax.weights.hub.fetch_repo", lambda name: hf)
    monkeypatch.setitem(REFERENCE_VALUES, "gpt2", right)
    monkeypatch.chdir(tmp_path)  # where no folder is called gpt2
    template, lines = load_chat_template("qa").source, []
    (hf / "chat_template.jinja").write_text(template)

    with capture_lines(lines):
        convert_model("gpt2", tmp_path / "own")

    assert lines[1].split() == ["not", "kept", "README.md"]
    assert "published values agree" in lines[2]
    loaded = load(tmp_path / "own")
    assert_same(loaded, model)
    assert loaded.chat_template == template
    for wrong in ({"num_params": 9}, {"embedding": (*table[0, :3], 9.0)}):
        monkeypatch.setitem(REFERENCE_VALUES, "gpt2", right._replace(**wrong))
        with pytest.raises(ModelError, match=r"expected .*\b9\b"):
            convert_model("gpt2", tmp_path / "other")
