"""A named data set is the pinned file or an error; others are generated."""

import gc
import os

import pytest

from gptjax.data import datasets
from gptjax.errors import DataError, ResourceError
from tests.servers import BODY, HASH, PIN, endless, file, plain, serving

# requests leaves a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    for name, value in (("DATA", tmp_path / "user"), ("HOME", tmp_path), ("OFFLINE", "")):
        monkeypatch.setenv(f"GPTJAX_{name}", str(value))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def fetch_from(url):
        entry = datasets.DatasetFile("right.txt", PIN, url)
        monkeypatch.setitem(datasets.DATASETS, "right", entry)
        return datasets.fetch_dataset("right")

    yield fetch_from
    gc.collect()


def test_a_download_is_verified_and_cached_and_a_failed_one_leaves_nothing(tmp_path, fetch):
    path = tmp_path / "data" / "right.txt"
    for answer, message in [
        (plain(BODY[:-1]), HASH),
        (plain(b"X" + BODY[1:]), HASH),
        (file(BODY, cut=100), "204700"),
        (plain(BODY + b"X"), f"{len(BODY)} bytes"),
        (endless, f"{len(BODY)} bytes"),
        (plain(b"<html>", 404), "404"),
    ]:
        expected = pytest.raises(ResourceError, match=f"(?s){message}.*{path}")
        with serving(answer) as (url, _), expected:
            fetch(url)
        assert list(path.parent.iterdir()) == []

    with serving(file(BODY)) as (url, asked):
        assert {fetch(url) for _ in range(3)} == {path}

    assert path.read_bytes() == BODY
    assert len(asked) == 1
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.fast
def test_local_files_are_verified_and_used_without_a_request(tmp_path, fetch, monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")

    with serving(file(BODY)) as (url, asked):
        with pytest.raises(DataError, match="GPTJAX_OFFLINE"):
            fetch(url)
        for folder in ("data", "user"):  # $GPTJAX_DATA has priority
            path = tmp_path / folder / "right.txt"
            path.parent.mkdir()
            path.write_bytes(BODY)
            assert fetch(url) == path
            path.write_bytes(b"x" * len(BODY))
            with pytest.raises(DataError, match=f"{path} .*{HASH}"):
                fetch(url)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=f"{path}: .*regular file"):
            fetch(url)

    assert asked == []


def test_word_tasks_have_their_answers_and_are_held_out_by_word():
    rows = datasets.word_tasks()

    assert rows == datasets.word_tasks()
    words = {(row["prompt"].split()[0], row["split"]) for row in rows}
    assert len(words) == len({word for word, _ in words})
    answers = [complete("sky") for _, complete in datasets.WORD_TASK_RULES.values()]
    assert answers == ["yks", "SKY", "3", "s", "y", "skies", "s-k-y", "sky sky"]
