"""Options and inputs that may or may not change when a run is resumed."""

import dataclasses
import json

import numpy as np
import pytest

from gptjax.config import RunConfig, config_options, from_dict
from gptjax.errors import ConfigError, ModelError
from gptjax.tasks.sft import SFT
from gptjax.training.run_dir import (
    TRACKED_INPUTS,
    check_provenance,
    hash_pytree,
    hash_rows,
    reconcile_config,
    reconcile_spike_policy,
    resume_policy,
)
from gptjax.weights.model_folder import save
from tests.runs import make_task
from tests.small_models import make_model
from tests.tasks.test_sft import make_config

TRAJECTORY = {
    *("model.dropout", "model.dtype", "model.attention", "model.remat"),
    *("data.batch_size", "data.batching", "finetune.lora_alpha", "finetune.lm_loss_weight"),
    *("finetune.dpo_beta", "train.steps", "train.eval_every", "train.eval_batches"),
    *("train.log_every", "train.accumulate", "train.loss_chunk_size", "checkpoint.every"),
}
OPERATIONAL = {
    *("train.sample_prompt", "checkpoint.keep"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
}


def make_run_config(**tables):
    return from_dict(RunConfig, tables)


def test_each_option_has_its_resume_policy():
    for name in config_options():
        expected = "trajectory" if name.startswith("optim.") or name in TRAJECTORY else "identity"
        if name in OPERATIONAL:
            expected = "operational"
        assert resume_policy(name) == expected, name


def test_an_option_may_change_as_its_policy_says(tmp_path):
    reconcile_config(tmp_path, RunConfig())
    config_toml = (tmp_path / "config.toml").read_text()

    moved = make_run_config(mesh={"fsdp": 2})
    assert reconcile_config(tmp_path, moved) == ["mesh.fsdp: 1 -> 2"]
    assert (tmp_path / "config.toml").read_text() == config_toml

    slower = make_run_config(optim={"peak_lr": 1e-5})
    with pytest.raises(ModelError, match=r"--allow-change optim\.peak_lr"):
        reconcile_config(tmp_path, slower)
    assert reconcile_config(tmp_path, slower, ["optim.peak_lr"]) == [
        "optim.peak_lr: 0.0006 -> 1e-05"
    ]
    assert reconcile_config(tmp_path, slower) == []
    with pytest.raises(ModelError, match=r"optim\.peak_lr: 1e-05 -> 0\.0006"):
        reconcile_config(tmp_path, RunConfig())

    deeper = make_run_config(optim={"peak_lr": 1e-5}, model={"n_layers": 3})
    with pytest.raises(ModelError, match=r"model\.n_layers: 12 -> 3"):
        reconcile_config(tmp_path, deeper)
    with pytest.raises(ConfigError, match=r"model\.n_layers is fixed"):
        reconcile_config(tmp_path, deeper, ["model.n_layers"])
    with pytest.raises(ConfigError, match=r"optim\.peak_lr\?"):
        reconcile_config(tmp_path, slower, ["optim.peak_lrs"])


def test_the_spike_policy_of_a_run_changes_only_if_allowed(tmp_path):
    assert reconcile_spike_policy(tmp_path, "") == "log"
    (tmp_path / "meta.json").write_text('{"on_spike": "skip", "started": "now"}')

    for requested in ("", "skip"):
        assert reconcile_spike_policy(tmp_path, requested) == "skip"
    with pytest.raises(ModelError, match="--allow-change on-spike"):
        reconcile_spike_policy(tmp_path, "log")
    with pytest.raises(ConfigError, match="log, skip"):
        reconcile_spike_policy(tmp_path, "ignore")
    assert reconcile_spike_policy(tmp_path, "log", ["on-spike"]) == "log"
    assert reconcile_spike_policy(tmp_path, "") == "log"
    assert "now" in (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text('{"on_spike": "rollback"}')
    with pytest.raises(ConfigError, match="--on-spike rollback"):
        reconcile_spike_policy(tmp_path, "")


PROVENANCE = {
    "data": {"train": hash_rows(["a", "b"])},
    "tokenizer": {"name": "bytes", "hash": "0" * 64},
    "start": "1" * 64,
    "template": "2" * 64,
}


def test_inputs_that_are_equal_or_were_not_recorded_are_accepted(tmp_path):
    check_provenance(tmp_path, PROVENANCE)  # a new run
    (tmp_path / "meta.json").write_text(json.dumps(PROVENANCE))
    check_provenance(tmp_path, {**PROVENANCE, "devices": 8})
    (tmp_path / "meta.json").write_text("{}")
    check_provenance(tmp_path, PROVENANCE)


def test_a_changed_input_is_rejected_with_its_option_and_values(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(PROVENANCE))

    for name, (_, option) in TRACKED_INPUTS.items():
        for now in (None, "3" * 64):
            with pytest.raises(ModelError) as error:
                check_provenance(tmp_path, {**PROVENANCE, name: now})
            assert option in str(error.value)
            assert f"now {now[:16] if now else 'none'}." in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{" * 100_000, '{"a": 1, "a": 2}'])
def test_a_damaged_meta_json_is_an_error(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)

    with pytest.raises(ModelError, match=r"meta\.json"):
        check_provenance(tmp_path, PROVENANCE)


def test_hashes_depend_on_names_shapes_dtypes_values_and_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    trees = [
        {"a": array},
        {"b": array},
        {"a": array.T},
        {"a": array.reshape(3, 2)},
        {"a": array.view(np.int32)},
        {"a": np.where(array == 5, np.nextafter(array, 9), array)},
    ]
    rows = [[], ["ab"], ["a", "b"], ["b", "a"], [["a", "b"]], ["a", "b", "b"]]

    assert len({hash_pytree(tree) for tree in trees}) == len(trees)
    assert len({hash_rows(part)["sha256"] for part in rows}) == len(rows)


def test_the_provenance_of_a_run_has_all_its_inputs(tmp_path):
    model, template = make_model(context_length=64, n_layers=1), tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    save(model, tmp_path / "start")
    config = make_config(
        tmp_path, finetune__init_from=str(tmp_path / "start"), data__chat_template=str(template)
    )
    rows = tmp_path / "rows.jsonl"
    norm = {"bias": model.params["final_norm"]["bias"] + 1e-6}
    params = model.params | {"final_norm": model.params["final_norm"] | norm}
    changes = {
        "start": lambda: save(dataclasses.replace(model, params=params), tmp_path / "start"),
        "data": lambda: rows.write_text(rows.read_text().replace("first sky", "first sly")),
        "template": lambda: template.write_text(template.read_text() + "\n{# changed #}"),
    }

    before = make_task(SFT, config, tmp_path)[2].provenance
    for name, change in changes.items():
        change()
        after = make_task(SFT, config, tmp_path)[2].provenance
        assert {key for key in TRACKED_INPUTS if after[key] != before[key]} == {name}
        before = after
