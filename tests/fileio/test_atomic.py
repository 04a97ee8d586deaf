"""A file or folder is complete, or unchanged after a failure."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

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
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)

    for name in ("pipe", "link"):
        with pytest.raises(DataError, match=name):
            write_atomic(tmp_path / name, "text")

    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    return tmp_path / "a"


def test_a_folder_with_files_is_replaced_only_on_request(folder):
    for replace_folder in (False, True):
        # The message names the folder, and no temporary one.
        error = pytest.raises(OSError, match=rf"^[^>]* '{folder}'$")
        result = contextlib.nullcontext() if replace_folder else error
        with result, atomic_path(folder, replace_folder=replace_folder) as new:
            new.mkdir()
            (new / "new").touch()

        assert os.listdir(folder) == (["new"] if replace_folder else ["old"])
        assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_stays_if_no_new_one_can_take_its_place(folder, monkeypatch):
    with atomic_path(folder, replace_folder=True):
        pass  # nothing is written
    functions = iter([os.replace, mock.Mock(side_effect=OSError("full")), os.replace])
    monkeypatch.setattr(os, "replace", lambda *paths: next(functions)(*paths))
    with pytest.raises(OSError, match="full"), atomic_path(folder, replace_folder=True) as new:
        new.mkdir()

    assert os.listdir(folder) == ["old"]
    assert os.listdir(folder.parent) == ["a"]


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_is_replaced_and_not_followed(tmp_path, target, is_folder):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    path = tmp_path / "new" / "a"
    path.parent.mkdir()
    path.symlink_to(tmp_path / target)

    with atomic_path(path) as new:
        new.mkdir() if is_folder else new.touch()

    assert (path.is_symlink(), path.is_dir()) == (False, is_folder)
    assert os.listdir(path.parent) == ["a"]
    assert ((tmp_path / "file").read_text(), os.listdir(tmp_path / "folder")) == ("precious", [])


def test_what_a_killed_writer_left_is_removed_by_the_next_one(folder):
    parent, others = folder.parent, [folder.parent / ".gptjax-mine", folder.parent / "b"]
    for path in (*others, folder):
        with atomic_path(path, replace_folder=True) as new:
            new.mkdir()
            leftover = new.parent.with_name(f"{new.parent.name[:-8]}deadbeef")
            shutil.copytree(new.parent, leftover)
    os.rename(folder, leftover / "old")  # killed between the two renames
    before = set(os.listdir(parent))

    with atomic_path(folder):
        pass

    assert folder.is_dir()
    assert before - set(os.listdir(parent)) == {leftover.name}


def test_a_path_has_one_writer_at_a_time(tmp_path, caplog):
    caplog.set_level("INFO", "gptjax")
    path = tmp_path / "a"

    def write(text, wait):
        with atomic_path(path, wait=wait) as new:
            new.write_text(path.read_text() + text)

    with ThreadPoolExecutor() as pool, atomic_path(path) as new:
        with pytest.raises(DataError, match=str(path)):
            write("lost", wait=False)
        writers = [pool.submit(write, text, wait=True) for text in "bc"]
        while len(caplog.messages) < 2:  # both are waiting
            time.sleep(0.01)
        new.write_text("a")
    for writer in writers:
        writer.result()

    assert "".join(sorted(path.read_text())) == "abc"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_system_without_locks_does_without(folder, monkeypatch):
    flock = mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks"))
    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_path(folder / "b"), atomic_path(folder / "b") as new:
        new.touch()

    assert sorted(os.listdir(folder)) == ["b", "old"]


def test_no_file_exceeds_the_limit_of_its_reader(tmp_path):
    write_atomic(tmp_path / "a", "é" * 5, 10)
    with pytest.raises(DataError, match="b would have 12 bytes, more than the 10 "):
        write_atomic(tmp_path / "b", "é" * 6, 10)

    assert os.listdir(tmp_path) == ["a"]


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
