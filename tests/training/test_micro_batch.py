"""`train.accumulate = 0`: as many rows at a time as the memory holds."""

import dataclasses

import pytest

from gptjax.config import load_config
from gptjax.errors import ConfigError
from gptjax.tasks.train import train
from gptjax.training import estimate
from tests.runs import train_logged
from tests.tasks.test_pretrain import losses, make_config

pytestmark = pytest.mark.mesh


def test_a_run_chooses_the_fewest_micro_batches_that_fit(tmp_path, monkeypatch):
    config = make_config(tmp_path, train__accumulate=0, train__steps=2)
    parts = estimate.memory_bytes(
        estimate.resolve_config(
            dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=4))
        )
    )
    monkeypatch.setattr(
        estimate, "device_memory", lambda: sum(parts.values()) / estimate.USABLE_MEMORY_FRACTION
    )
    said = []

    train_logged(config, tmp_path / "run", said)

    assert any("accumulate 4 micro-batches of 2 rows" in line for line in said)
    assert load_config(tmp_path / "run" / "config.toml").train.accumulate == 4
    same = make_config(tmp_path, train__accumulate=4, train__steps=2)
    train(same, tmp_path / "same")
    assert losses(tmp_path / "run") == losses(tmp_path / "same")


def test_a_resumed_run_keeps_what_was_chosen(tmp_path, monkeypatch):
    config = make_config(tmp_path, train__accumulate=0, train__steps=2)
    # Less than a row needs by arithmetic, but not so little that it is refused.
    monkeypatch.setattr(estimate, "device_memory", lambda: 100 * 1024)
    train(config, tmp_path / "run")
    before = losses(tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.toml").train.accumulate == 8

    monkeypatch.setattr(estimate, "device_memory", lambda: 2**40)
    train(config, tmp_path / "run")

    assert losses(tmp_path / "run") == before


def test_a_model_of_unknown_size_is_refused(tmp_path):
    config = make_config(tmp_path, train__accumulate=0)
    tune = dataclasses.replace(config.finetune, init_from="gpt2")

    with pytest.raises(ConfigError, match=r"accumulate=0 .* finetune\.init_from"):
        train(dataclasses.replace(config, finetune=tune), tmp_path / "run")
