"""One writer per run folder; a process that died locks nobody out."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from gptjax.cli.main import main
from gptjax.errors import ModelError
from gptjax.training.run_lock import RUN_LOCK_FILE, run_lock

HOLD = """
import fcntl, pathlib, sys, time
file = pathlib.Path(sys.argv[1]).open("w")
fcntl.flock(file, fcntl.LOCK_EX)
print("its owner", file=file, flush=True)
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_writer_learns_who_the_first_is_until_that_has_ended(tmp_path, capsys):
    path = tmp_path / RUN_LOCK_FILE
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(ModelError, match="its owner"), run_lock(tmp_path):
                pytest.fail("the lock was acquired twice")
            assert main(["train", "configs/tiny.toml", "--run", str(tmp_path)]) == 2
            assert f"{tmp_path}: its owner" in capsys.readouterr().err
        finally:
            other.kill()
            other.wait()

    for _ in range(2):
        with run_lock(tmp_path):
            owner = rf"pid {os.getpid()} on {os.uname().nodename}, started 20\d\d-"
            with pytest.raises(ModelError, match=owner), run_lock(tmp_path):
                pytest.fail("the lock was acquired twice")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_run_starts_on_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)

    with run_lock(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / RUN_LOCK_FILE).read_text()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x" * 99)

    (tmp_path / RUN_LOCK_FILE).symlink_to("precious")
    with pytest.raises(ModelError, match="cannot write"), run_lock(tmp_path):
        pytest.fail("the lock was acquired")

    assert (tmp_path / "precious").read_text() == "x" * 99
