"""Config options that may change when a run resumes."""

import dataclasses

import pytest

from gptjax.config import RunConfig, from_dict
from gptjax.errors import ConfigError, ModelError
from gptjax.fileio.atomic import write_atomic
from gptjax.training.run_dir import (
    check_config_changes,
    reconcile_config,
    reconcile_spike_policy,
    resume_policy,
)

OPTIONS = [
    f"{section.name}.{option.name}"
    for section in dataclasses.fields(RunConfig)
    for option in dataclasses.fields(getattr(RunConfig(), section.name))
]
IDENTITY = {
    *("model.vocab_size", "model.context_length", "model.n_layers", "model.n_heads"),
    *("model.d_model", "model.qkv_bias", "model.tie_embeddings"),
    *("model.vocab_multiple", "model.causal", "model.n_classes", "model.head_bias"),
    *("model.pool", "train.task", "train.seed", "finetune.init_from"),
    *("finetune.trainable", "finetune.lora_rank", "finetune.lora_targets"),
}
LOADING = {"data.batch_size", "data.batching"}  # all other data options are identity
OPERATIONAL = {
    *("train.sample_prompt", "checkpoint.keep"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
}
OTHERS = {  # options that do not take any value
    "model.n_heads": 6,
    "model.d_model": 24,
    "model.dropout": 0.5,
    "data.batch_size": 16,
    "data.test_fraction": 0.3,
    "data.val_fraction": 0.3,
    "optim.beta1": 0.5,
    "optim.beta2": 0.5,
    "train.accumulate": 2,
    "mesh.data": 4,
}


def with_other(name, config):
    """The config with another value of an option."""
    section, option = name.split(".")
    part = getattr(config, section)
    value = getattr(part, option)
    hint = {field.name: field.type for field in dataclasses.fields(part)}[option]
    choices = getattr(hint, "__args__", ())
    if name in OTHERS:
        value = OTHERS[name]
    elif choices:
        value = next(choice for choice in choices if choice != value)
    elif isinstance(value, str):
        value += "other"
    else:
        value = not value if isinstance(value, bool) else value + 1
    return dataclasses.replace(config, **{section: dataclasses.replace(part, **{option: value})})


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_its_policy(name):
    expected = "operational" if name in OPERATIONAL else "trajectory"
    if name in IDENTITY or (name.startswith("data.") and name not in LOADING):
        expected = "identity"

    assert resume_policy(name) == expected


def test_a_run_of_an_earlier_version_is_rejected_with_the_reason(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[tune]\nstart = "gpt2"\n[train]\ntask = "instruct"\n')
    before = config.read_bytes()

    with pytest.raises(ModelError, match="earlier version") as error:
        reconcile_config(tmp_path, RunConfig())

    assert "`tune.start` is now `finetune.init_from`" in str(error.value)
    assert "train.task = 'instruct' is now 'sft'" in str(error.value)
    assert "--run DIR" in str(error.value)
    assert config.read_bytes() == before


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_may_change_as_its_class_says(name):
    before = RunConfig()
    after, kind = with_other(name, before), resume_policy(name)

    if kind == "operational":
        (line,) = check_config_changes("run", before, after, [])
        assert line.startswith(f"{name}: ")
    elif kind == "trajectory":
        with pytest.raises(ModelError, match=f"--allow-change {name}"):
            check_config_changes("run", before, after, [])
        (line,) = check_config_changes("run", before, after, [name])
        assert line.startswith(f"{name}: ")
    else:
        with pytest.raises(ModelError, match=rf"{name}: .* fixed for a run"):
            check_config_changes("run", before, after, [])
        with pytest.raises(ConfigError, match=f"{name} is fixed"):
            check_config_changes("run", before, after, [name])


def test_an_option_to_allow_that_is_none_is_said_with_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean optim.peak_lr\?"):
        check_config_changes("run", RunConfig(), RunConfig(), ["optim.peak_lrs"])


def test_what_is_computed_from_now_on_is_written_and_the_rest_is_not(tmp_path):
    reconcile_config(tmp_path, RunConfig())
    written = (tmp_path / "config.toml").read_text()
    slower = from_dict(RunConfig, {"optim": {"peak_lr": 1e-5}})

    assert reconcile_config(tmp_path, from_dict(RunConfig, {"mesh": {"fsdp": 2}})) == [
        "mesh.fsdp: 1 -> 2"
    ]
    assert (tmp_path / "config.toml").read_text() == written
    reconcile_config(tmp_path, slower, ["optim.peak_lr"])
    assert reconcile_config(tmp_path, slower) == []
    with pytest.raises(ModelError, match=r"optim.peak_lr: 1e-05 -> 0.0006"):
        reconcile_config(tmp_path, RunConfig())


def test_the_policy_for_spikes_stays_unless_it_may_change(tmp_path):
    assert reconcile_spike_policy(tmp_path, "") == "log"
    write_atomic(tmp_path / "meta.json", '{"on_spike": "skip", "started": "now"}')

    assert (
        reconcile_spike_policy(tmp_path, "") == reconcile_spike_policy(tmp_path, "skip") == "skip"
    )
    with pytest.raises(ModelError, match="--allow-change on-spike"):
        reconcile_spike_policy(tmp_path, "log")
    with pytest.raises(ConfigError, match="log, skip"):
        reconcile_spike_policy(tmp_path, "ignore")
    assert reconcile_spike_policy(tmp_path, "log", ["on-spike"]) == "log"
    assert reconcile_spike_policy(tmp_path, "") == "log"
    assert "now" in (tmp_path / "meta.json").read_text()


def test_a_policy_that_no_longer_exists_is_rejected(tmp_path):
    write_atomic(tmp_path / "meta.json", '{"on_spike": "rollback"}')

    with pytest.raises(ModelError, match="--on-spike rollback, which no longer exists"):
        reconcile_spike_policy(tmp_path, "")
