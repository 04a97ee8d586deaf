"""One writer per run folder; a process that died locks nobody out."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from gptjax.cli.main import main
from gptjax.errors import ModelError
from gptjax.training.run_dir import RUN_LOCK_FILE, run_lock

HOLD = """
import fcntl, pathlib, sys, time
file = pathlib.Path(sys.argv[1]).open("w")
fcntl.flock(file, fcntl.LOCK_EX)
print("its owner", file=file, flush=True)
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_writer_learns_who_the_first_is_until_that_has_ended(tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path / RUN_LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            assert main(["train", "configs/tiny.toml", "--run", str(tmp_path)]) == 2
            assert f"{tmp_path}: its owner" in capsys.readouterr().err
        finally:
            other.kill()

    for _ in range(2):
        with run_lock(tmp_path):
            owner = rf"pid {os.getpid()} on {os.uname().nodename}, started 20\d\d-"
            with pytest.raises(ModelError, match=owner), run_lock(tmp_path):
                pytest.fail("the lock was acquired twice")


def test_a_run_starts_on_a_file_system_without_locks_and_follows_no_link(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks")

    path = tmp_path / RUN_LOCK_FILE
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with run_lock(tmp_path):
            assert f"pid {os.getpid()} on" in path.read_text()
    path.rename(tmp_path / "precious")
    before = (tmp_path / "precious").read_text()

    path.symlink_to("precious")
    with pytest.raises(ModelError, match=str(path)), run_lock(tmp_path):
        pytest.fail("the lock was acquired")
    assert (tmp_path / "precious").read_text() == before
