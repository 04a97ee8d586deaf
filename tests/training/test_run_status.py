"""State of a run: what its lock, events and files say, also to another machine."""

import fcntl
import os
import threading
import time

import pytest

from gptjax.config import RunConfig, from_dict
from gptjax.errors import DivergenceError, ModelError
from gptjax.runtime.preemption import Interrupted
from gptjax.runtime.supervisor import HANG_TIMEOUT_SECONDS
from gptjax.training import run_status
from gptjax.training.metrics import log_event
from gptjax.training.run_dir import RUN_LOCK_FILE, reconcile_config, run_lock
from gptjax.training.run_status import read_run_status


@pytest.fixture
def run_dir(tmp_path):
    """Half of the steps of a run."""
    reconcile_config(tmp_path, from_dict(RunConfig, {"train": {"steps": 20}}))
    for step in (5, 10):
        log_event(tmp_path / "metrics.jsonl", "train", step, loss=1.0, tokens_per_s=100.0)
    return tmp_path


def end_with(run_dir, error):
    with pytest.raises(type(error)), run_lock(run_dir):
        raise error


def test_a_run_is_running_while_its_process_has_the_lock(run_dir):
    with run_lock(run_dir):
        states = [read_run_status(run_dir) for _ in range(2)]
    after = read_run_status(run_dir)

    assert [status.state for status in states] == ["running"] * 2
    assert states[0].process[:2] == (os.uname().nodename, os.getpid())
    assert abs(states[0].since - time.time()) < 60
    assert (states[0].step, states[0].last("train")["loss"]) == (10, 1.0)
    assert after.state == "finished"  # `run_lock` says so, not the number of steps


def test_a_run_that_ended_says_how(run_dir):
    end_with(run_dir, Interrupted("saved"))
    stopped = read_run_status(run_dir)
    end_with(run_dir, DivergenceError("the loss is NaN"))
    failed = read_run_status(run_dir)

    assert stopped.state == "stopped"
    assert (failed.state, failed.process.outcome) == ("failed", "the loss is NaN")
    assert abs(failed.since - time.time()) < 60


def kill(run_dir, host=None):
    """Leaves the lock file of a killed process, perhaps one of another host."""
    path = run_dir / RUN_LOCK_FILE
    with run_lock(run_dir):
        record = path.read_text()
    path.write_text(record.replace(os.uname().nodename, host) if host else record)


def test_a_run_whose_process_was_killed_is_dead_since_its_last_event(run_dir):
    kill(run_dir)
    newest = max(event["time"] for event in read_run_status(run_dir).events)
    dead = read_run_status(run_dir)
    later = 1234567890.0 + 2e9
    line = f'{{"event": "save", "step": 10, "time": {later}}}\n'
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line)

    assert dead.state == "dead"
    assert newest <= dead.since == max(newest, dead.process.started)
    assert read_run_status(run_dir).since == later


def test_a_killed_run_is_finished_if_it_had_reached_its_end(run_dir):
    kill(run_dir)
    log_event(run_dir / "metrics.jsonl", "train", 20, loss=1.0)
    assert read_run_status(run_dir).state == "dead"

    (run_dir / "report.md").write_text("# Run")

    assert read_run_status(run_dir).state == "finished"


def test_a_run_on_another_host_is_running_until_it_is_silent(run_dir, monkeypatch):
    kill(run_dir, "elsewhere")
    assert read_run_status(run_dir).state == "running"

    now = time.time()
    monkeypatch.setattr(run_status.time, "time", lambda: now + HANG_TIMEOUT_SECONDS + 60)
    assert read_run_status(run_dir).state == "dead"


def test_the_time_left_is_at_the_speed_since_the_last_start(run_dir):
    path = run_dir / "metrics.jsonl"
    path.unlink()
    for event, step, at in (
        *(("train", 4, 1000), ("train", 8, 1001), ("resume", 8, 5000)),
        *(("train", 10, 5100), ("train", 12, 5120)),
    ):
        log_event(path, event, step, time=at)

    status = read_run_status(run_dir)

    assert status.seconds_left(5120.0) == 80  # 8 steps of 10 s
    assert status.seconds_left(5130.0) == 70
    assert status.seconds_left(9999.0) == 0


def test_reading_the_state_neither_fails_nor_stops_a_start(run_dir):
    (run_dir / RUN_LOCK_FILE).write_text("\0 not a record")
    assert read_run_status(run_dir).state == "dead"
    descriptor = os.open(run_dir / RUN_LOCK_FILE, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # a reader that is about to release it
    timer = threading.Timer(0.03, os.close, [descriptor])
    timer.start()

    with run_lock(run_dir):
        assert read_run_status(run_dir).state == "running"

    timer.join()


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        read_run_status(tmp_path)
