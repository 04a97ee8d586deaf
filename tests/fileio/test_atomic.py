"""A file or folder is complete, or unchanged after a failure."""

import contextlib
import errno
import os
import stat

import pytest

from gptjax.fileio import atomic
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
    write_atomic(path, "new")
    assert path.read_text() == "new"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    return tmp_path / "a"


def test_a_folder_with_files_is_replaced_only_on_request(folder):
    for replace_folder in (False, True):
        result = contextlib.nullcontext() if replace_folder else pytest.raises(OSError)
        with result, atomic_path(folder, replace_folder=replace_folder) as new:
            new.mkdir()
            (new / "new").touch()

        assert os.listdir(folder) == (["new"] if replace_folder else ["old"])
        assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_stays_if_the_new_one_cannot_take_its_place(folder, monkeypatch):
    monkeypatch.setattr(atomic, "fsync", lambda path: None)
    with pytest.raises(FileNotFoundError), atomic_path(folder, replace_folder=True):
        pass  # nothing is written, so nothing can take its place

    assert os.listdir(folder) == ["old"]


def test_files_and_folders_are_flushed_where_the_file_system_can(tmp_path, monkeypatch):
    flushed = []

    def only_files(descriptor):
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if flushed[-1]:
            raise OSError(errno.EINVAL, "invalid argument")

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomic(tmp_path / "a.txt", "a")

    assert flushed == [False, True]  # the file, then its folder


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    os.mkfifo(tmp_path / "pipe")

    assert read_small_file(tmp_path / "a", 4) == b"1234"
    for name, limit in (("a", 3), ("pipe", 4), (".", 4)):
        with pytest.raises(ValueError, match=r"regular|3"):
            read_small_file(tmp_path / name, limit)
