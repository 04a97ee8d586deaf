"""Training with a tracker that fails: the same losses, and one message."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from gptjax.config import (
    GPTConfig,
    MeshConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
    find_config,
    load_config,
)
from gptjax.errors import ConfigError
from gptjax.tasks.train import train
from gptjax.tracking import process
from gptjax.training.metrics import log_event, read_events
from tests.runs import capture_lines, train_logged

# Stands in for the package trackio; {action} is the body of `Run.log`.
FAKE_PACKAGE = """
import json, resource, subprocess, sys, time

class Run:
    def log(self, metrics, step):
        {action}
    def finish(self):
        pass

def init(**options):
    return Run()

Markdown = Image = str
"""
FAILURES = [  # action, and a part of the message
    ("raise RuntimeError('the service is down')", "the service is down"),
    (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); open('{file}', 'w').write('x')",
        "File too large",
    ),
]


@pytest.fixture
def run_dir(tmp_path):
    """Run that has not ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    log_event(folder / "metrics.jsonl", "train", 1, loss=2.5)
    return folder


@pytest.fixture
def install_fake(tmp_path, monkeypatch):
    """Function that installs a fake package trackio."""

    def install(action):
        (tmp_path / "trackio.py").write_text(FAKE_PACKAGE.format(action=action))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "trackio", raising=False)

    return install


def tracker_messages(lines):
    return [line for line in lines if line.startswith("tracker")]


def test_a_tracker_gets_the_events_samples_and_pictures_of_a_run(tmp_path, run_dir, install_fake):
    sent = tmp_path / "sent.jsonl"
    install_fake(f"open('{sent}', 'a').write(json.dumps([step, metrics]) + chr(10))")

    with capture_lines([]) as lines, process.track_run(run_dir, "trackio"):
        log_event(run_dir / "metrics.jsonl", "sample", 2, text="a sample")
        (run_dir / "loss.png").write_bytes(b"picture")

    rows = [json.loads(line) for line in sent.read_text().splitlines()]
    sample = {"sample": "```\na sample\n```"}
    picture = {"pictures/loss": str(run_dir / "loss.png")}
    assert rows == [[1, {"train/loss": 2.5}], [2, sample], [2, picture]]
    assert not tracker_messages(lines)


@pytest.mark.parametrize(("action", "reason"), FAILURES)
def test_a_tracker_that_fails_is_reported_once(tmp_path, run_dir, install_fake, action, reason):
    install_fake(action.format(file=tmp_path / "file"))

    with capture_lines([]) as lines, process.track_run(run_dir, "trackio"):
        log_event(run_dir / "metrics.jsonl", "train", 2, loss=2.0)

    (message,) = tracker_messages(lines)
    assert reason in message
    assert "--to trackio" in message


def test_a_tracker_that_hangs_is_ended_and_changes_no_loss(tmp_path, monkeypatch, install_fake):
    monkeypatch.setattr(process, "FINISH_SECONDS", 0.2)
    install_fake("time.sleep(600)")
    config = dataclasses.replace(
        load_config(find_config("tiny")),
        model=GPTConfig(context_length=8, n_layers=1, n_heads=1, d_model=8),
        train=TrainConfig(steps=2, log_every=1, eval_batches=1, sample_prompt=""),
        optim=OptimConfig(warmup_steps=1),
        mesh=MeshConfig(data=1),
    )
    losses, messages = [], []
    for tracker in ("none", "trackio"):
        lines, run_dir = [], tmp_path / tracker
        train_logged(dataclasses.replace(config, track=TrackConfig(to=tracker)), run_dir, lines)
        losses.append([e["loss"] for e in read_events(run_dir / "metrics.jsonl") if "loss" in e])
        messages.append(tracker_messages(lines))

    assert losses[0] == losses[1]
    assert not messages[0]
    (message,) = messages[1]
    assert "did not finish" in message


def test_a_tracker_that_is_not_installed_is_an_error_before_training(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    config = dataclasses.replace(load_config(find_config("tiny")), track=TrackConfig(to="wandb"))
    with pytest.raises(ConfigError, match=r"\[wandb\]"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
