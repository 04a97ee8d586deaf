"""Following a run: each event is sent once, by one process at a time."""

import shutil
from typing import get_args

import pytest

from gptjax.config import TrackerName
from gptjax.errors import ModelError, ResourceError
from gptjax.tracking import follow
from gptjax.tracking.trackers import SINKS
from gptjax.training.metrics import log_event


class RecordingSink:
    """Sink that remembers what it gets."""

    opened, steps, pictures, configs = 0, [], [], []

    def __init__(self, run):
        type(self).opened += 1
        self.configs.append(run.config)

    def log(self, record):
        self.steps.append(record.step)

    def log_picture(self, path, record):
        self.pictures.append((path.name, record.step))

    def close(self):
        self.steps.append("closed")


@pytest.fixture
def sink(monkeypatch):
    class Sink(RecordingSink):
        steps, pictures, configs = [], [], []

    monkeypatch.setitem(SINKS, "trackio", Sink)
    return Sink


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.toml").write_text("[train]\nsteps = 3\n")
    log_event(tmp_path / "metrics.jsonl", "train", 1)
    log_event(tmp_path / "metrics.jsonl", "train", 2)
    return tmp_path


def send(run_dir):
    return follow.follow_run(run_dir, "trackio", lambda: False)


def test_what_was_sent_is_not_sent_again(run_dir, sink):
    assert send(run_dir) == 2
    assert send(run_dir) == 0
    assert (sink.steps, sink.opened) == ([1, 2, "closed"], 1)

    log_event(run_dir / "metrics.jsonl", "train", 3)
    assert send(run_dir) == 1
    assert sink.steps == [1, 2, "closed", 3, "closed"]
    assert sink.configs[0] == {"train": {"steps": 3}}


def test_events_that_arrive_while_it_waits_are_sent_before_it_ends(run_dir, sink):
    later = iter([(3, True), (4, False)])

    def wait():
        step, is_open = next(later)
        log_event(run_dir / "metrics.jsonl", "train", step)
        return is_open

    assert follow.follow_run(run_dir, "trackio", wait) == 4
    assert sink.steps == [1, 2, 3, 4, "closed"]


def test_a_picture_is_sent_again_only_after_it_has_changed(run_dir, sink):
    (run_dir / "loss.png").write_bytes(b"one")
    send(run_dir)
    send(run_dir)
    assert sink.pictures == [("loss.png", 2)]

    (run_dir / "loss.png").write_bytes(b"another")
    assert send(run_dir) == 1
    assert sink.pictures == [("loss.png", 2)] * 2


def test_nothing_is_recorded_as_sent_after_a_failure(run_dir, sink, monkeypatch):
    def fail(self, record):
        raise RuntimeError("down")

    with monkeypatch.context() as context:
        context.setattr(sink, "log", fail)
        with pytest.raises(RuntimeError, match="down"):
            send(run_dir)

    assert send(run_dir) == 2


def test_one_process_at_a_time_sends_a_run(run_dir, sink):
    def wait():
        with pytest.raises(ModelError, match="another process"):
            send(run_dir)
        return False

    assert follow.follow_run(run_dir, "trackio", wait) == 2


def test_the_last_space_of_a_disk_is_left_to_the_training(run_dir, sink, monkeypatch):
    usage = shutil.disk_usage(run_dir)._replace(free=follow.MIN_FREE_DISK_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="MiB are free"):
        send(run_dir)


def test_a_damaged_state_is_an_error_that_names_its_file(run_dir, sink):
    send(run_dir)
    (run_dir / "tracking" / "trackio.json").write_text("{")
    with pytest.raises(ModelError, match=r"trackio\.json"):
        send(run_dir)


def test_there_is_a_sink_for_each_tracker():
    assert SINKS.keys() == set(get_args(TrackerName))
