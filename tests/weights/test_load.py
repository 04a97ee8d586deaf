"""Models of all layouts load with the same numbers, and nothing else loads."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gptjax
from gptjax.errors import ModelError
from gptjax.tree import flatten_with_names
from gptjax.weights.export import export_model
from gptjax.weights.load import aligned_empty, load
from tests.build_openai_fixture import FOLDER, HPARAMS, arrays
from tests.small_models import assert_same, change, change_config, make_model


def test_names_without_prefix_and_buffers_are_read(hf, model):
    def edit(arrays):
        plain = {n.removeprefix("transformer."): a for n, a in arrays.items()}
        plain["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        plain["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(1)
        return plain

    change(hf, edit)

    assert_same(gptjax.load(hf), model)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_precisions_become_float32(hf, model, dtype):
    change(hf, lambda arrays: {n: a.astype(dtype) for n, a in arrays.items()})

    for name, leaf in flatten_with_names(gptjax.load(hf).params).items():
        expected = np.asarray(flatten_with_names(model.params)[name]).astype(dtype)
        np.testing.assert_array_equal(leaf, expected.astype(np.float32))


def test_files_with_an_index_are_one_model(hf, model):
    arrays = safetensors.numpy.load_file(hf / "model.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[n % 2] for n, name in enumerate(arrays)}
    for file in files:
        part = {name: arrays[name] for name in arrays if weight_map[name] == file}
        safetensors.numpy.save_file(part, hf / file)
    (hf / "model.safetensors").unlink()
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    assert_same(gptjax.load(hf), model)

    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(ModelError, match=r"index\.json"):
        gptjax.load(hf)


def test_a_book_file_needs_the_number_of_heads_unless_they_are_64_wide(tmp_path):
    model = make_model(d_model=128, tie_embeddings=False)
    lines = []
    for name, exported in (("wide", model), ("narrow", make_model())):
        export_model(exported, "book", tmp_path / name)
        (tmp_path / name / "config.json").unlink()
    file = shutil.move(tmp_path / "wide" / "model.safetensors", tmp_path / "x.safetensors")

    assert_same(load(file, lines.append), model)
    assert "2, " in lines[0]
    with pytest.raises(ModelError, match=r'\{"n_heads": 12\}'):
        gptjax.load(tmp_path / "narrow")


def test_rows_without_a_token_are_cut(hf, model):
    def edit(arrays):
        table = arrays["transformer.wte.weight"]
        arrays["transformer.wte.weight"] = np.concatenate([table, table[:3]])

    change(hf, edit)
    change_config(hf, vocab_size=260)
    lines = []

    assert_same(load(hf, lines.append), model)
    assert "3 rows" in lines[0]


def with_tensor(name, edit):
    """An edit that replaces one tensor."""
    return lambda arrays: arrays.update({name: np.ascontiguousarray(edit(arrays[name]))})


LN_2 = "transformer.h.1.ln_2.bias"
ONES = np.ones(16, np.float32)
INVALID_TENSORS = {
    "missing": (lambda a: a.__delitem__(LN_2), "lacks 1 .* h.1.ln_2.bias"),
    "renamed": (lambda a: a.update(x=a.pop("transformer.ln_f.bias")), "lacks 1 .* ln_f.bias"),
    "unexpected": (lambda a: a.update({"transformer.h.2.ln_2.bias": ONES}), "1 .*h.2.ln_2.bias"),
    "twice": (lambda a: a.update({"ln_f.bias": ONES}), "ln_f.bias and transformer.ln_f.bias|both"),
    "transposed": (
        with_tensor("transformer.h.0.mlp.c_fc.weight", lambda a: a.T),
        r"float32 \(64, 16\).* \(16, 64\)",
    ),
    "integers": (with_tensor("transformer.h.0.ln_1.weight", lambda a: a.view(np.int32)), "int32"),
    "not finite": (with_tensor(LN_2, lambda a: a * np.nan), "h.1.ln_2.bias"),
    "infinite": (with_tensor(LN_2, lambda a: a - np.inf), "h.1.ln_2.bias"),
}
INVALID_CONFIGS = [
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"n_inner": 3}, "n_inner=3"),
    ({"n_layer": 10**9}, "n_layers=1000000000"),
    ({"n_head": "2"}, "n_head='2'"),
    ({"n_head": 3}, "n_heads=3"),
    ({"vocab_size": 200}, "257 tokens.* 200"),
    ({"n_positions": 1 << 40}, "context_length=1099511627776"),
]


@pytest.mark.parametrize("name", INVALID_TENSORS)
def test_tensors_of_another_model_are_rejected(hf, name):
    edit, message = INVALID_TENSORS[name]
    change(hf, edit)

    with pytest.raises(ModelError, match=message):
        gptjax.load(hf)


def test_configs_of_another_model_are_rejected(hf):
    text = (hf / "config.json").read_text()
    for values, message in INVALID_CONFIGS:
        (hf / "config.json").write_text(text)
        change_config(hf, **values)
        with pytest.raises(ModelError, match=message):
            gptjax.load(hf)
    for content in ("", "[]", "{", '"x"', "[" * 100_000):
        (hf / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json"):
            gptjax.load(hf)
    (hf / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        gptjax.load(hf)


def test_paths_without_a_model_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()

    for name in ("empty", "nowhere"):
        with pytest.raises(ModelError, match=f"no model '{tmp_path / name}'"):
            gptjax.load(tmp_path / name)


def test_a_pickle_is_rejected_with_code_that_converts_it(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02}")

    for source in (path, tmp_path):
        with pytest.raises(ModelError, match="pickle") as error:
            gptjax.load(source)
        lines = str(error.value).splitlines()[1:]
        assert len(lines) == 2
        compile("\n".join(line.strip() for line in lines), "advice", "exec")


def test_invalid_model_folders_are_rejected(model, tmp_path):
    gptjax.save(model, tmp_path / "own")
    assert_same(gptjax.load(tmp_path / "own"), model)
    shape = dataclasses.asdict(model.config)
    text = (tmp_path / "own" / "config.json").read_text()

    for values, message in [
        ({"format": "gptjax-9"}, "gptjax-9"),
        ({"model": {"n_heds": 2}}, "n_heads"),
        ({"model": shape | {"n_layers": 1 << 60}}, "n_layers=1152921504606846976"),
        ({"model": 3}, "model"),
        ({"labels": ["a", "b"]}, "2 labels for 0"),
        ({"tokenizer": {"name": "bytes", "hash": "0" * 64}}, "000000000000"),
    ]:
        (tmp_path / "own" / "config.json").write_text(text)
        change_config(tmp_path / "own", **values)
        with pytest.raises(ModelError, match=message):
            gptjax.load(tmp_path / "own")
    config = json.loads(text)
    del config["labels"]  # as in folders of early versions
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    assert_same(gptjax.load(tmp_path / "own"), model)
    change(tmp_path / "own", lambda arrays: arrays.__delitem__("final_norm/bias"))
    with pytest.raises(ModelError, match="final_norm/bias"):
        gptjax.load(tmp_path / "own")


@pytest.mark.parametrize(
    ("old", "new"), [("plain", "reference"), ("prefix", "chunked"), ("blockwise", "flash")]
)
def test_a_model_folder_with_an_old_attention_name_is_read(tmp_path, model, old, new):
    gptjax.save(model, tmp_path / "own")
    change_config(tmp_path / "own", model=dataclasses.asdict(model.config) | {"attention": old})

    loaded = gptjax.load(tmp_path / "own")

    assert loaded.config == dataclasses.replace(model.config, attention=new)


@pytest.mark.fast
def test_parameters_are_used_where_they_were_read():
    """On a CPU, no second copy of the model is made."""
    array = aligned_empty((64, 64))

    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.fast
def test_what_tensorflow_wrote_is_imported_bit_for_bit():
    expected, model = arrays(), gptjax.load(FOLDER)
    blocks = model.params["blocks"]
    qkv = expected["model/h1/attn/c_attn/w"][0]

    assert (model.config.n_heads, model.tokenizer.name) == (2, "bytes")
    for name, leaf in (
        ("model/wte", model.params["token_embedding"]["embedding"]),
        ("model/wpe", model.params["position_embedding"]["embedding"]),
        ("model/ln_f/g", model.params["final_norm"]["scale"]),
        ("model/h0/ln_2/b", blocks["mlp_norm"]["bias"][0]),
        ("model/h1/mlp/c_fc/w", blocks["mlp"]["up"]["kernel"][1]),
        ("model/h0/attn/c_proj/w", blocks["attention"]["out"]["kernel"][0]),
    ):
        np.testing.assert_array_equal(np.ravel(leaf), np.ravel(expected[name]))
    for n, name in enumerate(("query", "key", "value")):
        kernel = blocks["attention"][name]["kernel"][1].reshape(8, 8)
        np.testing.assert_array_equal(kernel, qkv[:, 8 * n : 8 * n + 8])


def test_the_openai_layout_is_the_hf_layout_under_other_names(tmp_path):
    """Exported and read again, it is the same model, so both tables agree."""
    model = gptjax.load(FOLDER)

    export_model(model, "hf", tmp_path / "hf")

    assert_same(gptjax.load(tmp_path / "hf"), model)


def test_invalid_hparams_are_rejected(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "openai")
    cases = [(json.dumps(HPARAMS | {n: v}), n) for n in HPARAMS for v in (0, True, 1.0, "8", None)]
    cases += [(text, "hparams") for text in ("", "[]", "{", "[" * 60_000)]

    for text, message in cases:
        (folder / "hparams.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            gptjax.load(folder)
