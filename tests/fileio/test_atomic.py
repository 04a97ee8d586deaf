"""A file or folder is complete, or unchanged after a failure."""

import errno
import os
import stat

import pytest

from gptjax.errors import DataError
from gptjax.fileio.atomic import atomic_path, open_atomic, write_atomic
from gptjax.fileio.strict_json import read_small_file


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"

    write_atomic(path, "old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:  # noqa: PT012
        file.write("half")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with open_atomic(path) as file:
        file.write("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("replace_folder", [True, False])
def test_a_folder_with_files_is_replaced_only_on_request(tmp_path, replace_folder):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()

    try:
        with atomic_path(path, replace_folder=replace_folder) as new:
            new.mkdir()
            (new / "new").touch()
    except OSError:
        assert not replace_folder

    assert os.listdir(path) == (["new"] if replace_folder else ["old"])
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()
    replace = os.replace

    def fail_once(source, target):
        if target == path:
            monkeypatch.setattr(os, "replace", replace)
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="input"), atomic_path(path, replace_folder=True) as new:
        new.mkdir()

    assert os.listdir(path) == ["old"]


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomic(tmp_path / "a.txt", "a")

    assert (tmp_path / "a.txt").read_text() == "a"


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "a").mkdir()

    with pytest.raises(DataError, match=str(tmp_path / "a")), open_atomic(tmp_path / "a"):
        pass

    assert (tmp_path / "a").is_dir()


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    os.mkfifo(tmp_path / "pipe")

    assert read_small_file(tmp_path / "a", 4) == b"1234"
    for name, limit in (("a", 3), ("pipe", 4), (".", 4)):
        with pytest.raises(ValueError, match=r"regular|3"):
            read_small_file(tmp_path / name, limit)
