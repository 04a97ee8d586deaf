"""One writer: a second process is told of the first; a dead one keeps nobody out."""

import os
import signal
import subprocess
import sys

import pytest

from gptjax.cli.main import main
from gptjax.errors import ModelError
from gptjax.training.run_lock import RUN_LOCK_FILE, run_lock

HOLD = """
import sys, time
from pathlib import Path
from gptjax.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the run folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_the_first_is(tmp_path, other):
    known = rf"pid {other.pid} on {os.uname().nodename}, started 20\d\d-"

    with pytest.raises(ModelError, match=known), run_lock(tmp_path):
        pytest.fail("it was let in")


def test_the_command_ends_with_2_and_names_the_holder(tmp_path, other, capsys):
    assert main(["train", "configs/tiny.toml", "--run", str(tmp_path)]) == 2

    assert f"trains in {tmp_path}: pid {other.pid}" in capsys.readouterr().err


def test_the_lock_dies_with_its_process(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()

    with run_lock(tmp_path):
        assert f'"pid": {os.getpid()},' in (tmp_path / RUN_LOCK_FILE).read_text()


def test_who_has_finished_lets_the_next_one_in(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path):
            pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x" * 99)
    (tmp_path / RUN_LOCK_FILE).symlink_to("precious")

    with pytest.raises(ModelError, match="cannot write"), run_lock(tmp_path):
        pytest.fail("it was let in")

    assert (tmp_path / "precious").read_text() == "x" * 99


def test_a_holder_that_has_not_said_who_it_is_keeps_others_out_too(tmp_path, other):
    os.truncate(tmp_path / RUN_LOCK_FILE, 0)

    with pytest.raises(ModelError, match="not yet recorded"), run_lock(tmp_path):
        pytest.fail("it was let in")
