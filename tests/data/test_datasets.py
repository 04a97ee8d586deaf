"""A named data set is the pinned file or an error, never anything else."""

import gc

import pytest

from gptjax.data import datasets
from gptjax.errors import DataError
from gptjax.fileio import download
from tests.servers import BODY, HASH, endless, file, head, plain, serving

# requests leaves a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Collects the garbage of a test before the next one."""
    yield
    gc.collect()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folder of $GPTJAX_DATA and the cache, both empty."""
    data_dir, home = tmp_path / "data", tmp_path / "home"
    data_dir.mkdir()
    for name, value in (("DATA", data_dir), ("HOME", home), ("OFFLINE", "")):
        monkeypatch.setenv(f"GPTJAX_{name}", str(value))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return data_dir, home / "data"


@pytest.fixture
def fetch(places, monkeypatch):
    def fetch_from(url):
        entry = datasets.DatasetFile("right.txt", len(BODY), HASH, url)
        monkeypatch.setitem(datasets.DATASETS, "right", entry)
        return datasets.fetch_dataset("right")

    return fetch_from


def test_a_download_is_verified_and_cached(places, fetch):
    path = places[1] / "right.txt"

    with serving(file(BODY)) as (url, asked):
        assert {fetch(url) for _ in range(3)} == {path}

    assert path.read_bytes() == BODY
    assert len(asked) == 1
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def stall(handler):
    head(handler, Content_Length=len(BODY))
    handler.wfile.write(BODY[:-1])
    handler.wfile.flush()
    handler.connection.settimeout(5)
    handler.connection.recv(1)  # until the client has given up


def test_a_failed_download_leaves_nothing(places, fetch, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_SECONDS", 0.1)
    for answer, message in [
        (plain(BODY[:-1]), HASH),
        (plain(b"X" + BODY[1:]), HASH),
        (file(BODY, cut=100), "204700"),
        (plain(BODY + b"X"), f"{len(BODY)} bytes"),
        (endless, f"{len(BODY)} bytes"),
        (plain(b"<html>", 404), "404"),
        (stall, "timed out"),
    ]:
        with (
            serving(answer) as (url, _),
            pytest.raises(DataError, match=f"(?s){message}.*{places[1] / 'right.txt'}"),
        ):
            fetch(url)
        assert list(places[1].iterdir()) == []
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/"):
        fetch("http://127.0.0.1:9/")


def test_local_files_are_verified_and_used_without_a_request(places, fetch, monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")
    places[1].mkdir(parents=True)

    with serving(file(BODY)) as (url, asked):
        with pytest.raises(DataError, match="GPTJAX_OFFLINE"):
            fetch(url)
        for folder in (places[1], places[0]):  # $GPTJAX_DATA has priority
            path = folder / "right.txt"
            path.write_bytes(BODY)
            assert fetch(url) == path
            path.write_bytes(b"x" * len(BODY))
            with pytest.raises(DataError, match=f"{path} .*{HASH}"):
                fetch(url)

    assert asked == []


def test_the_pins_are_those_of_the_real_files(shared_data, monkeypatch):
    monkeypatch.setenv("GPTJAX_DATA", str(shared_data))

    for name, entry in datasets.DATASETS.items():
        assert datasets.fetch_dataset(name) == shared_data / entry.file_name
        assert entry.url.startswith("https://")
    with pytest.raises(DataError, match="tinyshakespeare"):
        datasets.fetch_dataset("tinyshakespear")
