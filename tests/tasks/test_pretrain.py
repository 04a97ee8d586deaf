"""Pretraining runs: what they write, and that interruptions change nothing."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import gptjax
from gptjax.checkpoint.retention import list_steps
from gptjax.config import MeshConfig, RunConfig
from gptjax.data.prepare import open_dataset
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation import perplexity
from gptjax.fileio.atomic import remove_path
from gptjax.runtime.preemption import Interrupted
from gptjax.tasks.pretrain import PRETRAIN, isolate_documents
from gptjax.tasks.train import train
from gptjax.training import metrics
from gptjax.training.metrics import read_events
from tests.processes import TEXT
from tests.runs import capture_lines, config_with, delete_after, make_task


def make_config(folder, **changes) -> RunConfig:
    (folder / "text.txt").write_text(TEXT)
    table = {
        "model": {"context_length": 16, "n_layers": 1, "n_heads": 2, "d_model": 8},
        "data": {"source": str(folder / "text.txt"), "tokenizer": "bytes", "batch_size": 16},
        "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
        "train": {"steps": 12, "log_every": 1, "eval_every": 6, "eval_batches": 2},
        "checkpoint": {"every": 4},
    }
    return config_with(table, **changes)


def losses(folder):
    events = read_events(folder / "metrics.jsonl")
    return [(e["step"], e["loss"]) for e in events if e["event"] in ("train", "eval")]


def assert_equal(params, other):
    jax.tree.map(np.testing.assert_array_equal, params, other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its config, folder and model."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(folder, model__dropout=0.1, train__accumulate=2, train__loss_chunk_size=4)
    return config, folder / "run", train(config, folder / "run")


def test_a_run_folder_has_everything_that_the_contract_names(finished):
    _, folder, model = finished

    names = "config.toml meta.json metrics.jsonl loss.png lr.png report.md data"
    for name in [*names.split(), "model/model.safetensors", "checkpoints/12"]:
        assert (folder / name).exists(), name
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["tokenizer"]["hash"] == model.tokenizer.hash
    events = read_events(folder / "metrics.jsonl")
    kinds = [e["event"] for e in events]
    assert [kinds.count(kind) for kind in ("train", "eval", "save")] == [12, 3, 3]
    assert [e["step"] for e in events if e["event"] == "sample"] == [0, 6, 12]
    assert losses(folder)[-1][1] < losses(folder)[0][1]


def test_the_model_folder_or_the_newest_valid_checkpoint_is_used(finished, tmp_path):
    config, folder, model = finished
    run_dir, lines = tmp_path / "run", []
    shutil.copytree(folder, run_dir)

    (run_dir / "metrics.jsonl").unlink()
    assert_equal(train(config, run_dir).params, model.params)  # without further training
    assert not losses(run_dir)
    for _ in range(2):
        loaded = gptjax.load(run_dir)
        assert (loaded.config, loaded.tokenizer.hash) == (model.config, model.tokenizer.hash)
        assert_equal(loaded.params, model.params)
        (run_dir / "model" / "model.safetensors").unlink(missing_ok=True)
    shutil.copytree(folder / "model", run_dir / "model", dirs_exist_ok=True)
    text = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(text.replace("steps = 12", "steps = 13"))  # longer
    path = max((run_dir / "checkpoints" / "12").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with capture_lines(lines):
        older = gptjax.load(run_dir)
    assert lines == [f"step     8 of the unfinished run {run_dir}"]
    assert not np.array_equal(*(jax.tree.leaves(m.params)[0] for m in (older, model)))
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="checkpoints"):
        gptjax.load(run_dir)


def test_a_checkpoint_folder_is_the_model_after_its_steps(finished, tmp_path):
    _, folder, model = finished

    last, earlier = (gptjax.load(folder / "checkpoints" / step) for step in ("12", "8"))

    assert_equal(last.params, model.params)
    assert last.tokenizer.hash == model.tokenizer.hash
    assert not np.array_equal(*(jax.tree.leaves(m.params)[0] for m in (earlier, model)))
    with pytest.raises(ModelError, match="8, 12"):
        gptjax.load(folder / "checkpoints" / "5")


def test_links_in_a_run_folder_are_replaced_and_not_followed(finished, tmp_path):
    config, folder, _ = finished
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    names = ["metrics.jsonl", "report.md", "loss.png", "lr.png", "model"]
    for path in (run_dir, elsewhere):
        shutil.copytree(folder, path)
    for name in names:
        remove_path(run_dir / name)
        (run_dir / name).symlink_to(elsewhere / name)
        for file in {elsewhere / name, *(elsewhere / name).glob("*")} - {elsewhere / "model"}:
            os.utime(file, (0, 0))

    train(config, run_dir)  # a finished run writes its results again

    assert not [name for name in names if (run_dir / name).is_symlink()]
    assert len(losses(run_dir)) == len(losses(folder))
    unchanged = [path for path in elsewhere.rglob("*") if path.stat().st_mtime == 0]
    assert len(unchanged) == 9


def test_the_last_evaluation_is_that_of_all_held_out_text(finished):
    config, folder, model = finished
    dataset = open_dataset(config.data, folder / "data")
    tokens = dataset.validation.read(0, len(dataset.validation))

    result = perplexity.score_tokens(model, tokens, 16, dataset.train.eot)

    events = read_events(folder / "metrics.jsonl")
    *_, final = (e for e in events if e["event"] == "eval")
    assert final["tokens"] == result.tokens == len(tokens) - 1
    assert final["loss"] == pytest.approx(result.loss, rel=1e-6)


@pytest.mark.fast
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    finished, tmp_path, monkeypatch
):
    config, folder, model = finished
    run_dir, log = tmp_path / "run", metrics.log_train_metrics

    def log_and_interrupt(run, logged_step, *args):
        if logged_step == 7:
            signal.raise_signal(signal.SIGTERM)
        return log(run, logged_step, *args)

    monkeypatch.setattr(metrics, "log_train_metrics", log_and_interrupt)
    with pytest.raises(Interrupted, match=r"after step [78];"):
        train(config, run_dir)
    monkeypatch.undo()
    saved = list_steps(run_dir / "checkpoints")[-1]
    assert losses(run_dir)[-1][0] == saved in (7, 8)
    assert gptjax.load(run_dir).config == model.config
    resumed = train(config, run_dir)

    assert_equal(resumed.params, model.params)
    assert losses(run_dir) == losses(folder)


def test_a_run_can_be_resumed_on_another_mesh_and_with_an_allowed_change(finished, tmp_path):
    config, folder, *_ = finished
    run_dir = tmp_path / "run"
    shutil.copytree(folder, run_dir)
    delete_after(run_dir / "checkpoints", 8)
    fewer = dataclasses.replace(config.train, eval_batches=1)
    changed = dataclasses.replace(config, train=fewer, mesh=MeshConfig(data=2, fsdp=4))

    with pytest.raises(ModelError, match=r"train\.eval_batches: 2 -> 1"):
        train(changed, run_dir)
    train(changed, run_dir, allow_change=["train.eval_batches"])

    events = read_events(run_dir / "metrics.jsonl")
    (event,) = [e for e in events if e["event"] == "resume"]
    assert event["step"] == 8
    assert event["device"] == "8 x cpu, as data 2 x fsdp 4"
    np.testing.assert_allclose(losses(run_dir), losses(folder), rtol=2e-6)


def test_attention_stays_in_a_document_unless_documents_are_concatenated():
    modes = [isolate_documents(name) for name in ("auto", "packed", "concat")]
    assert modes == [True, True, False]


def test_invalid_data_and_options_are_reported(tmp_path):
    (tmp_path / "short.txt").write_text("abcdef")
    for source, changes, kind, message in [
        ("short.txt", {}, DataError, r"model\.context"),
        ("text.txt", {"model__vocab_size": 99}, ConfigError, r"model\.vocab_size=99"),
        ("text.txt", {"data__batching": "padded"}, ConfigError, r"data\.batching='padded'"),
    ]:
        config = make_config(tmp_path, data__source=str(tmp_path / source), **changes)
        with pytest.raises(kind, match=message):
            train(config, tmp_path / f"run-{message}")


def test_pretraining_continues_from_a_model_with_its_tokenizer(finished, tmp_path):
    _, folder, init_model = finished
    changes = {"data__tokenizer": "", "finetune__init_from": str(folder)}

    _, _, task = make_task(PRETRAIN, make_config(tmp_path, **changes), tmp_path / "on")

    model = task.to_model(task.init_state)
    assert_equal(model.params, init_model.params)
    assert model.tokenizer.hash == init_model.tokenizer.hash
