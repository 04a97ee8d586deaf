"""Weights out, and the check of what came in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.errors import ConfigError, ModelError
from gptjax.tree import flatten_with_names
from gptjax.weights import convert, hub, param_map
from gptjax.weights.convert import convert_model
from gptjax.weights.export import export_model, named_tensors
from tests.small_models import assert_same, change_config, make_model

SHAPES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "without biases": {"qkv_bias": False},
    "one head": {"n_heads": 1},
}


@pytest.mark.fast
@pytest.mark.parametrize("layout", ["hf", "book"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_exported_is_imported_bit_for_bit(layout, shape, tmp_path):
    model = make_model(**SHAPES[shape])

    said = export_model(model, layout, tmp_path / "out")
    again = gptjax.load(tmp_path / "out")

    assert "reloaded" in said
    if (layout, shape) == ("hf", "without biases"):  # there they are zeros
        assert again.config == dataclasses.replace(model.config, qkv_bias=True)
        bias = again.params["blocks"]["attention"]["query"].pop("bias")
        assert not bias.any()
        for name in ("key", "value"):
            del again.params["blocks"]["attention"][name]["bias"]
        again = dataclasses.replace(again, config=model.config)
    assert_same(again, model)


def test_rows_that_pad_the_vocabulary_are_not_exported(tmp_path):
    model = make_model(vocab_multiple=64)

    for layout in ("hf", "book"):
        export_model(model, layout, tmp_path / layout)
        again = gptjax.load(tmp_path / layout)
        table = again.params["token_embedding"]["embedding"]
        padded = model.params["token_embedding"]["embedding"]
        assert padded.shape[0] == 320
        np.testing.assert_array_equal(table, padded[:257])


@pytest.mark.parametrize("layout", param_map.SOURCE_LAYOUTS)
def test_the_table_covers_every_parameter_and_fills_no_tensor_twice(layout):
    model = make_model(tie_embeddings=layout == "openai")
    leaves = flatten_with_names(model.params)

    plan = param_map.param_slots(model.config, layout, leaves)

    assert set(leaves) <= set(param_map.PARAM_NAMES)
    filled = [home for homes in plan.values() for home in homes]
    assert {home.leaf for home in filled} == set(leaves)
    assert len({(home.leaf, home.layer) for home in filled}) == len(filled)
    for homes in plan.values():
        assert sorted(home.qkv_index or 0 for home in homes) == list(range(len(homes)))


def test_query_key_and_value_are_the_thirds_of_the_joint_tensor(model):
    joint = named_tensors(model, "hf")["h.1.attn.c_attn.weight"]
    kernel = model.params["blocks"]["attention"]["value"]["kernel"][1]

    np.testing.assert_array_equal(joint[:, 32:], np.reshape(kernel, (16, 16)))


def test_the_book_has_its_matrices_the_other_way_round(model):
    up = named_tensors(model, "book")["trf_blocks.0.ff.layers.0.weight"]

    assert up.shape == (64, 16)
    np.testing.assert_array_equal(up.T, model.params["blocks"]["mlp"]["up"]["kernel"][0])


def test_an_import_says_what_it_read_and_what_it_compared(hf, model, tmp_path):
    said = []

    convert_model(str(hf), tmp_path / "own", said.append)

    assert [line.split()[0] for line in said] == ["read", "check", "wrote"]
    assert "28 tensors, 10,832 parameters" in said[0]
    assert_same(gptjax.load(tmp_path / "own"), model)
    with pytest.raises(ModelError, match="already exists"):
        convert_model(str(hf), tmp_path / "own", said.append)


def test_a_public_name_is_compared_with_what_is_published(hf, tmp_path, monkeypatch):
    known = convert.ReferenceValues(10_832)
    monkeypatch.setitem(convert.REFERENCE_VALUES, "gpt2", known)
    monkeypatch.setattr(hub, "fetch_repo", lambda name, say: hf)
    monkeypatch.chdir(tmp_path)
    said = []

    convert_model("gpt2", tmp_path / "own", said.append)

    assert "number of parameters agrees" in said[1]
    assert "not compared, since none are recorded" in said[1]

    table = gptjax.load(hf).params["token_embedding"]["embedding"]
    right = known._replace(
        first_embedding=tuple(map(float, table[0, :3])), last_embedding=float(table[-1, -1])
    )
    model = gptjax.load(hf)
    assert "published values agree" in convert.check_reference_values(model, right)
    ids = model.tokenizer.encode(convert.REFERENCE_PROMPT)[:8]
    logits = gptjax.apply(model.config, model.params, jnp.array([ids]))[0, -1, :4]
    seen = right._replace(logits=tuple(map(float, logits)))
    assert "logits agree within" in convert.check_reference_values(model, seen)
    for wrong in (
        right._replace(num_params=10_833),
        right._replace(last_embedding=0.5),
        seen._replace(logits=(9.0,)),
    ):
        with pytest.raises(ModelError):
            convert.check_reference_values(model, wrong)


def test_exports_that_cannot_be_are_refused(model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot export to 'hff'\. Did you mean hf"):
        export_model(model, "hff", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ModelError, match="already exists"):
        export_model(model, "hf", tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot write"):
        export_model(model, "hf", tmp_path / "file" / "below")


def test_an_export_that_computes_something_else_leaves_nothing(model, tmp_path):
    broken = dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    )

    with pytest.raises(ModelError, match="non-finite"):
        export_model(broken, "hf", tmp_path / "out")

    assert not list(tmp_path.iterdir())


def test_a_classifier_comes_back_with_its_labels_bit_for_bit(tmp_path):
    model = classifier(tie_embeddings=True)

    export_model(model, "hf", tmp_path / "out")
    again = gptjax.load(tmp_path / "out")

    assert again.labels == ("a", "b", "c")
    assert_same(again, model)
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_head_for_tokens_is_not_part_of_an_exported_classifier(tmp_path):
    model = classifier(tie_embeddings=False)

    export_model(model, "hf", tmp_path / "out")
    again = gptjax.load(tmp_path / "out")

    assert again.config.tie_embeddings
    np.testing.assert_array_equal(again.params["head"]["kernel"], model.params["head"]["kernel"])


@pytest.mark.parametrize("changes", [{"pool": "mean"}, {"head_bias": True}, {"causal": False}])
def test_classifiers_that_transformers_does_not_have_are_refused(changes, tmp_path):
    with pytest.raises(ModelError, match="has no equivalent in transformers"):
        export_model(classifier(**changes), "hf", tmp_path / "out")
    with pytest.raises(ModelError, match="Use --to hf"):
        export_model(classifier(**changes), "book", tmp_path / "out")

    assert not list(tmp_path.iterdir())


def test_a_classifier_without_names_for_its_classes_is_refused(tmp_path):
    export_model(classifier(), "hf", tmp_path / "out")

    for table in ({"0": "a", "2": "c"}, {"0": 1}, {}, 3):
        change_config(tmp_path / "out", id2label=table)
        with pytest.raises(ModelError, match="does not name the classes"):
            gptjax.load(tmp_path / "out")


def classifier(**changes):
    """A model with a head for three classes."""
    model = make_model(n_classes=3, **changes)
    return dataclasses.replace(model, labels=("a", "b", "c"))
