"""A run goes on with what it has read so far, or not at all."""

import dataclasses
import json
import os

import numpy as np
import pytest

from gptjax.errors import ModelError
from gptjax.tasks.train import train
from gptjax.training.run_dir import (
    TRACKED_INPUTS,
    check_provenance,
    hash_pytree,
    hash_rows,
    hash_text,
)
from gptjax.weights.model_folder import save
from tests.small_models import make_model
from tests.tasks.test_sft import make_config

FACTS = {
    "data": {"train": hash_rows(["a", "b"])},
    "tokenizer": {"name": "bytes", "hash": "0" * 64},
    "start": "1" * 64,
    "template": hash_text("{{ a }}"),
}


def write_meta(folder, **changes):
    (folder / "meta.json").write_text(json.dumps({"devices": 1, **FACTS, **changes}))


def test_the_same_facts_pass_and_so_does_what_was_never_recorded(tmp_path):
    check_provenance(tmp_path, FACTS)  # a new run
    write_meta(tmp_path)
    check_provenance(tmp_path, {**FACTS, "devices": 8})
    (tmp_path / "meta.json").write_text("{}")
    check_provenance(tmp_path, FACTS)


@pytest.mark.parametrize("name", TRACKED_INPUTS)
@pytest.mark.parametrize("now", [None, "2" * 64])
def test_each_change_is_refused_with_what_was_and_is(tmp_path, name, now):
    write_meta(tmp_path)
    what, option = TRACKED_INPUTS[name]

    with pytest.raises(ModelError) as error:
        check_provenance(tmp_path, {**FACTS, name: now})

    text = str(error.value)
    assert f"the {what} of the run" in text
    assert f"({option})" in text
    assert f"now {now[:16] if now else 'none'}. Restore" in text


def test_one_row_more_is_told_in_numbers(tmp_path):
    write_meta(tmp_path)

    with pytest.raises(ModelError, match="train rows was 2, now 3"):
        check_provenance(tmp_path, {**FACTS, "data": {"train": hash_rows(["a", "b", "c"])}})


@pytest.mark.parametrize("text", ["", "[", "[1]", "{" * 100_000, '{"a": 1, "a": 2}'])
def test_a_damaged_record_is_an_error(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)

    with pytest.raises(ModelError, match=r"cannot read .*meta.json"):
        check_provenance(tmp_path, FACTS)


def test_hashes_see_every_part_of_what_they_stand_for():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    different = [
        {"a": array},
        {"b": array},
        {"a": array.T},
        {"a": array.reshape(3, 2)},
        {"a": array.view(np.int32)},
        {"a": np.where(array == 5, np.nextafter(array, 9), array)},
    ]

    assert len({hash_pytree(tree) for tree in different}) == len(different)
    rows = [[], ["ab"], ["a", "b"], ["b", "a"], [["a", "b"]], ["a", "b", "b"]]
    assert len({hash_rows(part)["sha256"] for part in rows}) == len(rows)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished run that started from a model and has a template of its own."""
    folder = tmp_path_factory.mktemp("tuned")
    save(make_model(context_length=64), folder / "start")
    (folder / "own.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    config = make_config(
        folder,
        finetune__init_from=str(folder / "start"),
        data__chat_template=str(folder / "own.jinja"),
        train__steps=2,
    )
    train(config, folder / "run")
    return config, folder


def other_model():
    """A model in which one number is another one."""
    model = make_model(context_length=64)
    bias = model.params["final_norm"]["bias"].at[0].add(1e-6)
    norm = {**model.params["final_norm"], "bias": bias}
    return dataclasses.replace(model, params={**model.params, "final_norm": norm})


CHANGES = {
    "start": lambda folder: save(other_model(), folder / "start"),
    "template": lambda folder: (folder / "own.jinja").write_text(
        (folder / "own.jinja").read_text() + "\n{# changed #}"
    ),
    "data": lambda folder: (folder / "rows.jsonl").write_text(
        (folder / "rows.jsonl").read_text().replace("first sky", "first sly")
    ),
}


def test_a_file_that_is_only_touched_is_the_same(tuned):
    config, folder = tuned
    os.utime(folder / "own.jinja")

    train(config, folder / "run")


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_resumed_with_another(tuned, name):
    config, folder = tuned
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    CHANGES[name](folder)

    with pytest.raises(ModelError, match=f"the {TRACKED_INPUTS[name][0]} of the run in"):
        train(config, folder / "run")

    for path, data in before.items():  # nothing of the run was touched but its lock
        if path.is_relative_to(folder / "run") and path.name != ".lock":
            assert path.read_bytes() == data
        path.write_bytes(data)
