"""Whole runs: what they leave, and that stopping them changes nothing."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import gptjax
from gptjax.checkpoint.retention import list_steps
from gptjax.config import MeshConfig, RunConfig, from_dict
from gptjax.data.prepare import open_dataset
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation import perplexity
from gptjax.runtime.preemption import Interrupted
from gptjax.tasks import pretrain
from gptjax.tasks.pretrain import PRETRAIN
from gptjax.tasks.train import train
from gptjax.training import metrics
from gptjax.training.metrics import read_events
from gptjax.training.run_dir import reconcile_config
from tests.runs import make_task, train_logged

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(300))


def make_config(folder, **changes) -> RunConfig:
    (folder / "text.txt").write_text(TEXT)
    table = {
        "model": {"context_length": 16, "n_layers": 1, "n_heads": 2, "d_model": 8},
        "data": {"source": str(folder / "text.txt"), "tokenizer": "bytes"},
        "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
        "train": {"steps": 12, "log_every": 1, "eval_every": 6, "eval_batches": 2},
        "checkpoint": {"every": 4},
    }
    for name, value in changes.items():
        section, option = name.split("__")
        table[section][option] = value
    return from_dict(RunConfig, table)


def losses(folder):
    events = read_events(folder / "metrics.jsonl")
    return [(e["step"], e["loss"]) for e in events if e["event"] in ("train", "eval")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run: its config, folder, model and what it printed."""
    folder = tmp_path_factory.mktemp("unbroken")
    config, said = make_config(folder), []
    model = train_logged(config, folder / "run", said)
    return config, folder / "run", model, said


@pytest.mark.fast
def test_a_run_leaves_everything_that_its_folder_promises(unbroken):
    _config, folder, model, _ = unbroken

    names = "config.toml meta.json metrics.jsonl loss.png lr.png report.md data"
    for name in [*names.split(), "model/model.safetensors", "checkpoints/12"]:
        assert (folder / name).exists(), name
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["tokenizer"]["hash"] == model.tokenizer.hash
    assert meta["versions"]["jax"] == jax.__version__
    events = read_events(folder / "metrics.jsonl")
    kinds = [e["event"] for e in events]
    assert [kinds.count(k) for k in ("train", "eval", "save")] == [12, 3, 3]
    assert [e["step"] for e in events if e["event"] == "sample"] == [0, 6, 12]
    assert events[-1]["step"] == 12
    waits = [e["input_wait"] for e in events if e["event"] == "train"]
    assert all(0 <= wait <= 1 for wait in waits)
    assert losses(folder)[-1][1] < losses(folder)[0][1]


def test_the_plan_comes_before_the_first_step_and_a_line_per_interval_after(unbroken):
    *_, said = unbroken

    plan = [line.split()[0] for line in said[:8]]
    assert plan == ["run", "model", "data", "step", "steps", "memory", "attention", "device"]
    assert any(line.startswith("compiled") for line in said)
    before, *lines = [line for line in said if line[:5] == "step " and " | " in line]
    assert before.startswith("step  0/12 | val ")
    assert len(lines) == 12
    for text in lines:
        names = ("step ", "loss ", "lr ", "|g| ", "tok/s", "eta ")
        places = [text.index(name) for name in names]
        assert places == sorted(places)


def test_a_progress_line_has_a_validation_loss_exactly_at_evaluated_steps(unbroken):
    _, folder, _, said = unbroken
    events = read_events(folder / "metrics.jsonl")
    evaluated = {e["step"]: e["loss"] for e in events if e["event"] == "eval"}
    lines = [line for line in said if line[:5] == "step " and " | " in line]

    assert list(evaluated) == [0, 6, 12]
    for step, line in enumerate(lines):
        assert line.startswith(f"step {step:>2}/12 | ")
        values = re.findall(r"\| val ([0-9.]+)", line)
        assert values == ([f"{evaluated[step]:.4f}"] if step in evaluated else [])


def test_the_model_folder_computes_what_the_run_computed(unbroken):
    _config, folder, model, _ = unbroken

    loaded = gptjax.load(folder)

    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert loaded.config == model.config
    assert loaded.tokenizer.hash == model.tokenizer.hash


def test_an_unfinished_run_is_loaded_from_its_newest_valid_checkpoint(unbroken, tmp_path):
    _, folder, model, _ = unbroken
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "model" / "model.safetensors").unlink()

    loaded = gptjax.load(run)
    assert (loaded.config, loaded.tokenizer.hash) == (model.config, model.tokenizer.hash)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)

    file = max((run / "checkpoints" / "12").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = sorted(run.rglob("*"))
    lines = []
    older = gptjax.load(run, lines.append)
    assert lines == [f"step     8 of the unfinished run {run}"]
    assert not np.array_equal(*(jax.tree.leaves(m.params)[0] for m in (older, model)))
    assert sorted(run.rglob("*")) == before

    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelError, match="checkpoints"):
        gptjax.load(run)


def test_the_last_evaluation_is_that_of_the_whole_validation_text(unbroken):
    config, folder, model, _ = unbroken
    dataset = open_dataset(config.data, folder / "data")
    held_out = dataset.validation.read(0, len(dataset.validation))

    result = perplexity.score_tokens(model, held_out, 16, dataset.train.eot)

    final = list(read_events(folder / "metrics.jsonl"))[::-1]
    final = next(e for e in final if e["event"] == "eval")
    assert final["tokens"] == result.tokens == len(held_out) - 1
    assert final["loss"] == pytest.approx(result.loss, rel=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_and_resumed_run_is_the_unbroken_one_bit_for_bit(
    unbroken, tmp_path, monkeypatch, step
):
    config, folder, model, _ = unbroken
    stopped = tmp_path / "run"
    forward = metrics.log_train_metrics

    def interrupting(run, done, *rest):
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        return forward(run, done, *rest)

    monkeypatch.setattr(metrics, "log_train_metrics", interrupting)
    with pytest.raises(Interrupted):
        train(config, stopped)
    monkeypatch.undo()
    saved = list_steps(stopped / "checkpoints")[-1]
    assert step <= saved < 12
    unfinished = gptjax.load(stopped)
    assert (unfinished.config, unfinished.tokenizer.hash) == (model.config, model.tokenizer.hash)
    resumed = train(config, stopped)

    jax.tree.map(np.testing.assert_array_equal, resumed.params, model.params)
    assert losses(stopped) == losses(folder)
    events = read_events(stopped / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "resume"] == [saved]


@pytest.mark.parametrize(
    ("module", "place", "call", "saved"),
    [
        (perplexity, "evaluate", 2, 6),
        (pretrain, "complete", 2, 6),
        (perplexity, "evaluate", 3, 12),
        (perplexity, "evaluate", 1, 0),
    ],
)
def test_an_evaluation_that_a_signal_came_into_is_made_when_the_run_goes_on(
    unbroken, tmp_path, monkeypatch, module, place, call, saved
):
    config, folder, model, _ = unbroken
    stopped, forward, calls = tmp_path / "run", getattr(module, place), []

    def interrupting(*args, **options):
        calls.append(place)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args, **options)

    monkeypatch.setattr(module, place, interrupting)
    text = f"interrupted after step {saved};" if saved else "no unsaved progress"
    with pytest.raises(Interrupted, match=text):
        train(config, stopped)
    monkeypatch.undo()
    found = list_steps(stopped / "checkpoints")
    assert found[-1:] == [saved] * bool(saved)
    resumed = train(config, stopped)

    jax.tree.map(np.testing.assert_array_equal, resumed.params, model.params)
    assert losses(stopped) == losses(folder)
    events = read_events(stopped / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "sample"] == [0, 6, 12]


def test_what_is_allowed_to_change_is_written_with_the_step_it_changes_at(unbroken, tmp_path):
    config, folder, *_ = unbroken
    moved = tmp_path / "run"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "checkpoints" / "12")
    optim = dataclasses.replace(config.optim, peak_lr=0.5)
    changed = dataclasses.replace(config, optim=optim)

    train(changed, moved, allow_change=["optim.peak_lr"])

    (event,) = [e for e in read_events(moved / "metrics.jsonl") if e["event"] == "resume"]
    assert (event["step"], event["changes"]) == (8, ["optim.peak_lr: 0.01 -> 0.5"])
    assert losses(moved)[:-5] == losses(folder)[:-5]
    assert losses(moved)[-1] != losses(folder)[-1]


def test_a_finished_run_is_not_trained_again(unbroken):
    config, folder, model, _ = unbroken
    before = (folder / "metrics.jsonl").read_bytes()

    again = train(config, folder)

    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_changed_config_is_refused_with_the_difference(unbroken):
    config, folder, *_ = unbroken
    optim = dataclasses.replace(config.optim, peak_lr=0.5)

    with pytest.raises(ModelError, match=r"optim.peak_lr: 0.01 -> 0.5"):
        train(dataclasses.replace(config, optim=optim), folder)


def test_a_run_goes_on_with_another_mesh_and_says_where(unbroken, tmp_path):
    config, folder, *_ = unbroken
    moved, said = tmp_path / "run", []
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "checkpoints" / "12")
    mesh = MeshConfig(data=2, fsdp=4)

    train_logged(dataclasses.replace(config, mesh=mesh), moved, said)

    assert said[:2] == [f"resumed  {moved} after step 8", "device   8 x cpu, as data 2 x fsdp 4"]
    np.testing.assert_allclose(losses(moved), losses(folder), rtol=2e-6)
    events = read_events(moved / "metrics.jsonl")
    (device,) = [e["device"] for e in events if e["event"] == "resume"]
    assert f"device   {device}" == said[1]
    assert (moved / "config.toml").read_text() == (folder / "config.toml").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_75_and_everything_saved(tmp_path, number):
    config = make_config(tmp_path, train__steps=100_000)
    (tmp_path / "run").mkdir()
    reconcile_config(tmp_path, config)
    command = [sys.executable, "-m", "gptjax", "train", str(tmp_path / "config.toml")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--run", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        for line in process.stdout:
            if "| loss" in line:
                process.send_signal(number)
                break
        rest = process.stdout.read()

    assert process.returncode == 75
    (saved,) = list_steps(tmp_path / "run" / "checkpoints")[-1:]
    assert f"interrupted after step {saved}" in rest
    assert losses(tmp_path / "run")[-1][0] == saved


def test_packed_documents_dropout_and_accumulation_run_together(tmp_path):
    rows = "\n".join(json.dumps({"text": line}) for line in TEXT.splitlines())
    (tmp_path / "text.jsonl").write_text(rows)
    config = make_config(
        tmp_path,
        data__source=str(tmp_path / "text.jsonl"),
        model__dropout=0.1,
        train__accumulate=4,
        train__loss_chunk_size=4,
    )

    train(config, tmp_path / "run")

    values = [loss for _, loss in losses(tmp_path / "run")]
    assert values[-1] < values[0]


BAD = {
    "empty corpus": ({"data__source": "empty.txt"}, DataError, "no text"),
    "short corpus": ({"data__source": "short.txt"}, DataError, "too few for model.context"),
    "invalid UTF-8": ({"data__source": "latin1.txt"}, DataError, r"latin1.txt:2"),
    "no such file": ({"data__source": "nowhere.txt"}, DataError, "nowhere.txt"),
    "vocabulary": ({"model__vocab_size": 99}, ConfigError, "model.vocab_size=99"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_cannot_be_trained_on_is_said_in_a_sentence(tmp_path, case):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abcdef")
    (tmp_path / "latin1.txt").write_bytes(b"good\n\xe9t\xe9\n")
    changes, kind, message = BAD[case]
    if source := changes.get("data__source"):
        changes = {"data__source": str(tmp_path / source)}

    with pytest.raises(kind, match=message):
        train(make_config(tmp_path, **changes), tmp_path / "run")


def test_a_run_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelError, match="cannot write the run folder"):
        train(make_config(tmp_path), tmp_path / "file" / "run")


def test_data_of_another_tokenizer_is_refused(tmp_path, unbroken):
    _, folder, *_ = unbroken
    config = make_config(tmp_path, data__source=str(folder / "data"), data__tokenizer="gpt2")

    with pytest.raises(DataError, match=r"data\.tokenizer=.* does not match"):
        train(config, tmp_path / "run")


def test_damaged_tokens_are_said_with_their_place(tmp_path, unbroken):
    _config, folder, *_ = unbroken
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    shard = data / "train-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)

    with pytest.raises(DataError, match=r"train-00000.bin: block 0, bytes 0 to"):
        train(make_config(tmp_path, data__source=str(data)), tmp_path / "run")


def test_pretraining_goes_on_from_a_model_with_its_tokenizer(unbroken, tmp_path):
    _, folder, start, _ = unbroken
    config = make_config(tmp_path, data__tokenizer="")
    tune = dataclasses.replace(config.finetune, init_from=str(folder))
    config = dataclasses.replace(config, finetune=tune)

    _, _, task = make_task(PRETRAIN, config, tmp_path / "on")

    fresh = task.to_model(task.init_state)
    jax.tree.map(np.testing.assert_array_equal, fresh.params, start.params)
    assert fresh.tokenizer.hash == start.tokenizer.hash
    tune = dataclasses.replace(tune, trainable="head")
    with pytest.raises(ConfigError, match=r"finetune\.trainable='head'"):
        make_task(PRETRAIN, dataclasses.replace(config, finetune=tune), tmp_path)


def test_ways_of_batching_conversations_are_refused(tmp_path):
    config = make_config(tmp_path, data__batching="padded")

    with pytest.raises(ConfigError, match=r"data\.batching='padded'"):
        make_task(PRETRAIN, config, tmp_path / "run")
