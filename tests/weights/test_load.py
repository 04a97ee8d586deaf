"""Weights in: other layouts hold the same numbers, and nothing else passes."""

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
from gptjax.weights.load import load
from tests.build_openai_fixture import FOLDER, arrays
from tests.small_models import assert_same, change, change_config, make_model


def test_names_without_prefix_and_buffers_are_read_too(hf, model):
    def edit(arrays):
        plain = {n.removeprefix("transformer."): a for n, a in arrays.items()}
        plain["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        plain["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(1)
        return plain

    change(hf, edit)

    assert_same(gptjax.load(hf), model)


@pytest.mark.parametrize(
    ("old", "new"), [("plain", "reference"), ("prefix", "chunked"), ("blockwise", "flash")]
)
def test_a_model_folder_with_an_old_attention_name_is_read(tmp_path, model, old, new):
    gptjax.save(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    metadata = json.loads(path.read_text())
    metadata["model"]["attention"] = old
    path.write_text(json.dumps(metadata))

    loaded = gptjax.load(tmp_path / "model")

    assert loaded.config == dataclasses.replace(model.config, attention=new)
    for name, leaf in flatten_with_names(loaded.params).items():
        np.testing.assert_array_equal(leaf, flatten_with_names(model.params)[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(hf, model, dtype):
    change(hf, lambda arrays: {n: a.astype(dtype) for n, a in arrays.items()})

    for name, leaf in flatten_with_names(gptjax.load(hf).params).items():
        expected = np.asarray(flatten_with_names(model.params)[name]).astype(dtype)
        np.testing.assert_array_equal(leaf, expected.astype(np.float32))


def test_files_with_an_index_are_one_model(hf, model):
    arrays = safetensors.numpy.load_file(hf / "model.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[n % 2] for n, name in enumerate(arrays)}
    for file in files:
        part = {name: arrays[name] for name in arrays if where[name] == file}
        safetensors.numpy.save_file(part, hf / file)
    (hf / "model.safetensors").unlink()
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))

    assert_same(gptjax.load(hf), model)

    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(ModelError, match="refers to files outside its folder"):
        gptjax.load(hf)


def test_a_book_file_is_read_by_itself_where_heads_are_64_wide(tmp_path):
    model = make_model(d_model=128, tie_embeddings=False)
    export_model(model, "book", tmp_path / "book")
    file = shutil.copy(tmp_path / "book" / "model.safetensors", tmp_path / "x.safetensors")
    said = []

    again = load(file, said.append)

    assert_same(again, model)
    assert "2, from GPT-2's head dim of 64" in said[0]


def test_a_book_file_of_other_heads_needs_their_number(tmp_path):
    export_model(make_model(), "book", tmp_path / "book")
    (tmp_path / "book" / "config.json").unlink()

    with pytest.raises(ModelError, match=r'\{"n_heads": 12\}'):
        gptjax.load(tmp_path / "book")


def test_rows_that_no_token_has_are_cut_and_said(hf, model):
    def edit(arrays):
        table = arrays["transformer.wte.weight"]
        arrays["transformer.wte.weight"] = np.concatenate([table, table[:3]])

    change(hf, edit)
    change_config(hf, vocab_size=260)
    said = []

    again = load(hf, said.append)

    assert_same(again, model)
    assert said == ["cut      3 rows without a token"]


def swap_type(arrays):
    name = "transformer.h.0.ln_1.weight"
    arrays[name] = arrays[name].view(np.int32)


def transpose(arrays):
    name = "transformer.h.0.mlp.c_fc.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)


def poison(arrays):
    arrays["transformer.h.1.ln_2.bias"][3] = np.nan


WRONG = {
    "a missing tensor": (
        lambda a: a.__delitem__("transformer.h.1.ln_2.bias"),
        "lacks 1 tensors .* h.1.ln_2.bias",
    ),
    "a renamed tensor": (
        lambda a: a.update({"x": a.pop("transformer.ln_f.bias")}),
        "lacks 1 tensors .* ln_f.bias",
    ),
    "a tensor too many": (
        lambda a: a.update({"transformer.h.2.ln_2.bias": np.zeros(16, np.float32)}),
        "has 1 unexpected tensors, such as h.2.ln_2.bias",
    ),
    "a name with and without prefix": (
        lambda a: a.update({"ln_f.bias": np.zeros(16, np.float32)}),
        "has both",
    ),
    "a transposed matrix": (transpose, r"is float32 \(64, 16\).* \(16, 64\)"),
    "integers of the same size": (swap_type, "is int32"),
    "a number that is not finite": (poison, "h.1.ln_2.bias contains non-finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_not_the_models_are_refused(hf, name):
    edit, message = WRONG[name]
    change(hf, edit)

    with pytest.raises(ModelError, match=message):
        gptjax.load(hf)


CONFIGS = {
    "another activation": ({"activation_function": "relu"}, "activation_function='relu'"),
    "another kind": ({"model_type": "llama"}, "model_type='llama'"),
    "another MLP": ({"n_inner": 3}, "n_inner=3"),
    "a billion layers": ({"n_layer": 10**9}, "n_layers=1000000000 is too large"),
    "no number": ({"n_head": "2"}, "n_head='2' is not a positive integer"),
    "heads that do not divide": ({"n_head": 3}, "a valid GPT: .*n_heads=3"),
    "fewer tokens than the tokenizer": ({"vocab_size": 200}, "the model has only 200"),
    "more positions": ({"n_positions": 1 << 40}, "context_length=1099511627776 is too"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_not_the_models_are_refused(hf, name):
    values, message = CONFIGS[name]
    change_config(hf, **values)

    with pytest.raises(ModelError, match=message):
        gptjax.load(hf)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(hf, text):
    (hf / "config.json").write_text(text)

    with pytest.raises(ModelError, match=r"config\.json"):
        gptjax.load(hf)


def test_folders_without_a_model_say_what_is_missing(hf, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no model in"):
        gptjax.load(tmp_path / "empty")
    with pytest.raises(ModelError, match="no such file or folder"):
        gptjax.load(tmp_path / "nowhere")
    (hf / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        gptjax.load(hf)


def test_a_pickle_is_refused_with_the_lines_that_turn_it_into_safetensors(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02}")

    for place in (path, tmp_path):
        with pytest.raises(ModelError, match="is a pickle") as caught:
            gptjax.load(place)
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 2
        compile("\n".join(line.strip() for line in lines), "advice", "exec")


def test_swapped_layers_are_noticed_where_the_hash_is_known(hf, model):
    def edit(arrays):
        a, b = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"
        arrays[a], arrays[b] = arrays[b], arrays[a]

    before = (hf / "model.safetensors").read_bytes()
    change(hf, edit)

    assert (hf / "model.safetensors").read_bytes() != before
    gptjax.load(hf)  # nothing but a hash could tell


def test_gptjax_folders_are_as_strict(model, tmp_path):
    gptjax.save(model, tmp_path / "own")
    assert_same(gptjax.load(tmp_path / "own"), model)

    change(tmp_path / "own", lambda a: a.__delitem__("final_norm/bias"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* final_norm/bias"):
        gptjax.load(tmp_path / "own")
    change_config(tmp_path / "own", format="gptjax-9")
    with pytest.raises(ModelError, match="this version reads 'gptjax-1'"):
        gptjax.load(tmp_path / "own")
    change_config(tmp_path / "own", format="gptjax-1", model={"n_heds": 2})
    with pytest.raises(ModelError, match="Did you mean n_heads"):
        gptjax.load(tmp_path / "own")
    huge = dataclasses.asdict(model.config) | {"n_layers": 1 << 60}
    change_config(tmp_path / "own", model=huge)
    with pytest.raises(ModelError, match="n_layers=1152921504606846976 is too large"):
        gptjax.load(tmp_path / "own")
    change_config(tmp_path / "own", model=3)
    with pytest.raises(ModelError, match="lacks model or tokenizer"):
        gptjax.load(tmp_path / "own")


def test_the_tokenizer_of_a_model_folder_is_its_own(model, tmp_path):
    gptjax.save(model, tmp_path / "own")
    tokenizer = {"name": "bytes", "hash": "0" * 64}
    change_config(tmp_path / "own", tokenizer=tokenizer)

    with pytest.raises(ModelError, match="was trained with 000000000000"):
        gptjax.load(tmp_path / "own")


@pytest.mark.fast
def test_parameters_are_used_where_they_were_read(hf):
    """On a CPU, no second copy of the model is made."""
    from gptjax.weights.load import aligned_empty

    array = aligned_empty((64, 64))

    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.fast
def test_what_tensorflow_wrote_is_imported_bit_for_bit():
    theirs, model = arrays(), gptjax.load(FOLDER)
    blocks = model.params["blocks"]
    joint = theirs["model/h1/attn/c_attn/w"][0]

    assert (model.config.n_heads, model.tokenizer.name) == (2, "bytes")
    for name, leaf in (
        ("model/wte", model.params["token_embedding"]["embedding"]),
        ("model/wpe", model.params["position_embedding"]["embedding"]),
        ("model/ln_f/g", model.params["final_norm"]["scale"]),
        ("model/h0/ln_2/b", blocks["mlp_norm"]["bias"][0]),
        ("model/h1/mlp/c_fc/w", blocks["mlp"]["up"]["kernel"][1]),
        ("model/h0/attn/c_proj/w", blocks["attention"]["out"]["kernel"][0]),
    ):
        np.testing.assert_array_equal(np.ravel(leaf), np.ravel(theirs[name]))
    for n, name in enumerate(("query", "key", "value")):
        kernel = blocks["attention"][name]["kernel"][1].reshape(8, 8)
        np.testing.assert_array_equal(kernel, joint[:, 8 * n : 8 * n + 8])


def test_the_openai_layout_is_the_hf_layout_under_other_names(tmp_path):
    """Exported and read again, it is the same model, so both tables agree."""
    model = gptjax.load(FOLDER)

    export_model(model, "hf", tmp_path / "hf")

    assert_same(gptjax.load(tmp_path / "hf"), model)
