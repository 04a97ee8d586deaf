"""Exports are read back bit for bit, and imports are checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.errors import ConfigError, ModelError
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tree import flatten_with_names
from gptjax.weights import convert, hub, param_map
from gptjax.weights.convert import convert_model
from gptjax.weights.export import export_model, named_tensors
from tests.small_models import assert_same, change_config, make_model


@pytest.mark.fast
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("hf", {}),
        ("hf", {"tie_embeddings": False, "n_heads": 1}),
        ("book", {"vocab_multiple": 64}),
        ("book", {"tie_embeddings": False, "qkv_bias": False}),
    ],
)
def test_exports_are_imported_bit_for_bit(layout, shape, tmp_path):
    model = make_model(**shape)

    export_model(model, layout, tmp_path / "out")
    loaded = gptjax.load(tmp_path / "out")

    if "vocab_multiple" in shape:  # rows that pad the vocabulary are not exported
        table = model.params["token_embedding"]["embedding"]
        assert table.shape[0] == 320
        loaded_table = loaded.params["token_embedding"]["embedding"]
        np.testing.assert_array_equal(loaded_table, table[:257])
    else:
        assert_same(loaded, model)


def test_missing_biases_are_zeros_in_hugging_face_files():
    tensors = named_tensors(make_model(qkv_bias=False), "hf")

    assert not tensors["h.1.attn.c_attn.bias"].any()
    assert tensors["h.1.attn.c_attn.bias"].shape == (48,)


@pytest.mark.parametrize("layout", param_map.SOURCE_LAYOUTS)
def test_the_table_covers_every_parameter_exactly_once(layout):
    model = make_model(tie_embeddings=layout == "openai")
    leaves = flatten_with_names(model.params)

    slots_by_name = param_map.param_slots(model.config, layout, leaves)

    filled = [slot for slots in slots_by_name.values() for slot in slots]
    assert {slot.leaf for slot in filled} == set(leaves) <= set(param_map.PARAM_NAMES)
    assert len({(slot.leaf, slot.layer) for slot in filled}) == len(filled)
    for slots in slots_by_name.values():
        assert sorted(slot.qkv_index or 0 for slot in slots) == list(range(len(slots)))


def test_tensors_have_the_layout_of_their_format(model):
    qkv = named_tensors(model, "hf")["h.1.attn.c_attn.weight"]
    up = named_tensors(model, "book")["trf_blocks.0.ff.layers.0.weight"]

    value = model.params["blocks"]["attention"]["value"]["kernel"][1]
    np.testing.assert_array_equal(qkv[:, 32:], np.reshape(value, (16, 16)))
    np.testing.assert_array_equal(up.T, model.params["blocks"]["mlp"]["up"]["kernel"][0])


def test_an_import_is_checked_and_keeps_the_chat_template(hf, model, tmp_path):
    template = load_chat_template("qa").source
    (hf / "chat_template.jinja").write_text(template)
    lines = []

    convert_model(str(hf), tmp_path / "own", lines.append)

    assert [line.split()[0] for line in lines] == ["read", "check", "wrote"]
    assert "28 tensors, 10,832 parameters" in lines[0]
    loaded = gptjax.load(tmp_path / "own")
    assert_same(loaded, model)
    assert loaded.chat_template == template
    with pytest.raises(ModelError, match=str(tmp_path / "own")):
        convert_model(str(hf), tmp_path / "own", lines.append)


def test_a_public_name_is_compared_with_published_values(hf, model, tmp_path, monkeypatch):
    known = convert.ReferenceValues(10_832)
    monkeypatch.setitem(convert.REFERENCE_VALUES, "gpt2", known)
    monkeypatch.setattr(hub, "fetch_repo", lambda name, log: hf)
    monkeypatch.chdir(tmp_path)
    lines = []
    convert_model("gpt2", tmp_path / "own", lines.append)
    assert "number of parameters agrees" in lines[1]

    table = model.params["token_embedding"]["embedding"]
    ids = model.tokenizer.encode(convert.REFERENCE_PROMPT)[:8]
    logits = gptjax.apply(model.config, model.params, jnp.array([ids]))[0, -1, :4]
    right = convert.ReferenceValues(
        10_832, tuple(map(float, table[0, :3])), float(table[-1, -1]), tuple(map(float, logits))
    )
    assert "logits agree" in convert.check_reference_values(model, right)
    for wrong in ({"num_params": 10_833}, {"last_embedding": 0.5}, {"logits": (9.0,)}):
        with pytest.raises(ModelError):
            convert.check_reference_values(model, right._replace(**wrong))


def test_impossible_exports_are_errors_and_leave_nothing(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    nan = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    labeled = dataclasses.replace(model, labels=("a", "b", "c"))

    def labeled_with(**values):
        return dataclasses.replace(labeled, config=dataclasses.replace(model.config, **values))

    cases = [
        (model, "hff", "out", ConfigError, "'hff'"),
        (model, "hf", "full", ModelError, "full"),
        (model, "hf", "full/x/below", ModelError, "full/x/below"),
        (dataclasses.replace(model, params=nan), "hf", "out", ModelError, "non-finite"),
        (labeled, "book", "out", ModelError, "--to hf"),
        (labeled_with(pool="mean"), "hf", "out", ModelError, "model.pool='mean'"),
        (labeled_with(head_bias=True), "hf", "out", ModelError, "model.head_bias=True"),
        (labeled_with(causal=False), "hf", "out", ModelError, "model.causal=False"),
    ]

    for exported, layout, folder, error, message in cases:
        with pytest.raises(error, match=message):
            export_model(exported, layout, tmp_path / folder)

    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_exported_with_its_labels(tied, tmp_path):
    model = classifier(tie_embeddings=tied)

    export_model(model, "hf", tmp_path / "out")
    loaded = gptjax.load(tmp_path / "out")

    assert loaded.labels == ("a", "b", "c")
    assert loaded.config.tie_embeddings  # no head for tokens is exported
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], model.params["head"]["kernel"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in card
    for id2label in ({"0": "a", "2": "c"}, {"0": 1}, {}, 3):
        change_config(tmp_path / "out", id2label=id2label)
        with pytest.raises(ModelError, match="id2label"):
            gptjax.load(tmp_path / "out")


def classifier(**changes):
    """A model with a head for three classes."""
    model = make_model(n_classes=3, **changes)
    return dataclasses.replace(model, labels=("a", "b", "c"))
