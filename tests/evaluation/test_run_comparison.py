"""Runs are compared by options, effort, seeds and held-out text."""

import dataclasses
import json

import numpy as np
import pytest

from gptjax.config import from_dict
from gptjax.data.prepare import prepare_dataset
from gptjax.errors import DataError, ModelError
from gptjax.evaluation import run_comparison
from gptjax.evaluation.run_comparison import RunRecord, read_run_records
from gptjax.training.metrics import log_event
from gptjax.training.run_dir import reconcile_config
from tests.processes import TABLE
from tests.runs import config_with


def write_run(run_dir, *, speed=100.0, loss=2.0, metadata=None, **changes):
    """A run folder of 20 steps with 512 tokens each, as training leaves it."""
    run_dir.mkdir(parents=True)
    config = config_with(TABLE, train__eval_every=10, **changes)
    reconcile_config(run_dir, config)
    log_event(run_dir / "metrics.jsonl", "eval", 0, split="validation", loss=5.0)
    for step in (10, 20):
        values = {"loss": loss + 1 / step, "tokens_per_s": speed}
        log_event(run_dir / "metrics.jsonl", "train", step, **values)
        values = {"split": "validation", "loss": loss + 2 / step, "bits_per_byte": loss}
        log_event(run_dir / "metrics.jsonl", "eval", step, **values)
    (run_dir / "meta.json").write_text(json.dumps(metadata or {"tokens_per_step": 512}))
    return run_dir


def test_runs_that_differ_only_in_seed_and_appearance_are_seeds_of_one_config(tmp_path):
    changes = [{}, {"train__seed": 1}, {"optim__peak_lr": 1e-4}, {"train__sample_prompt": "The"}]
    paths = [write_run(tmp_path / f"run{n}", **each) for n, each in enumerate(changes)]

    runs = read_run_records(paths)

    groups = run_comparison.group_seeds(runs)
    assert [[run.name for run in group] for group in groups] == [["run0", "run1", "run3"], ["run2"]]
    assert run_comparison.changed_options(runs) == {
        "optim.peak_lr": [1e-2, 1e-2, 1e-4, 1e-2],
        "train.sample_prompt": ["", "", "", "The"],
        "train.seed": [0, 1, 0, 0],
    }
    with pytest.raises(ModelError, match="twice"):
        read_run_records([paths[0], paths[0] / ".." / "run0"])
    with pytest.raises(ModelError, match=r"config\.toml"):
        read_run_records([paths[0], tmp_path])


def test_steps_have_their_tokens_seconds_and_flops(tmp_path):
    (run,) = read_run_records([write_run(tmp_path / "run", speed=256.0, model__vocab_size=257)])
    old = dataclasses.replace(run, metadata={})

    assert run.along("tokens", [0, 10]).tolist() == old.along("tokens", [0, 10]).tolist()
    assert run.along("tokens", [0, 10]).tolist() == [0, 5120]
    assert run.along("seconds", [0, 5, 10, 20]).tolist() == [0, 10, 20, 40]
    per_token = run_comparison.flops_per_token(run.config.model)
    assert run.along("flops", [1]).tolist() == [512 * per_token]
    classifier = from_dict(type(run.config), {"train": {"task": "classify"}})
    unknown = RunRecord("", run.run_dir, classifier, run.events, {})
    assert np.isnan(unknown.along("tokens", [5])).all()


def test_configs_are_compared_by_the_final_losses_of_finished_seeds(tmp_path):
    low = [write_run(tmp_path / f"a{n}", loss=2 + n / 100, train__seed=n) for n in range(3)]
    high = [write_run(tmp_path / f"b{n}", loss=3 + n / 100, train__seed=n) for n in range(3)]
    low, high = read_run_records(low), read_run_records(high)

    interval = run_comparison.compare_configs(low, high)

    assert interval.difference == pytest.approx(1)
    assert 0.9 < interval.low < 1 < interval.high < 1.1
    assert all(run.is_finished for run in low)
    shorter = [event for event in low[0].events if event["step"] < 20]
    assert not dataclasses.replace(low[0], events=shorter).is_finished
    assert not dataclasses.replace(low[0], events=[]).is_finished


def test_held_out_documents_are_the_same_text_whatever_the_tokenizer_is(tmp_path):
    texts = [f"{n} times {n} is {n * n}.\r\n ü" for n in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "table.jsonl").write_text(lines)
    paths = []
    for name, seed in (("bytes", 0), ("gpt2", 0), ("bytes", 1)):
        paths.append(write_run(tmp_path / f"{name}{seed}", data__tokenizer=name))
        source = [tmp_path / "table.jsonl"]
        prepare_dataset(source, name, paths[-1] / "data", val_fraction=0.5, seed=seed)
    runs = read_run_records(paths)

    found = [run_comparison.held_out_documents(run, 10**6) for run in runs]

    assert found[0] == found[1] != found[2]
    assert set(found[0]) < set(texts)
    assert len(found[0]) == 30
    assert run_comparison.has_same_validation(*runs[:2])
    assert not run_comparison.has_same_validation(*runs[1:])
    fewer = run_comparison.held_out_documents(runs[0], 300)
    assert fewer is not None
    assert set(fewer[:-1]) < set(found[0])
    assert 250 < len("".join(fewer).encode()) <= 300
    assert run_comparison.read_text_documents(tmp_path / "table.jsonl", 10**6) == texts
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="--text"):
        run_comparison.read_text_documents(tmp_path / "empty.txt", 10)


def test_the_held_out_rows_of_other_tasks_are_compared_by_their_hash(tmp_path):
    def run(name, **data):
        folder = write_run(tmp_path / name, metadata={"data": data}, train__task="sft")
        return read_run_records([folder])[0]

    one, same = run("one", validation={"rows": 3}, train=1), run("same", validation={"rows": 3})

    assert run_comparison.has_same_validation(one, same)
    assert not run_comparison.has_same_validation(one, run("other", validation={"rows": 4}))
    assert not run_comparison.has_same_validation(run("none"), run("neither"))
    assert run_comparison.held_out_documents(one, 100) is None
