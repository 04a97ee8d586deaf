"""A named data set is the pinned file or an error, never anything else."""

import dataclasses
import gc
import hashlib
import stat

import pytest

from gptjax.data import datasets
from gptjax.errors import DataError
from gptjax.fileio import download
from tests.file_server import BODY, HASH, endless, file, head, plain, serving

# requests leaves a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Collects the garbage of a test before the next one."""
    yield
    gc.collect()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folder of $GPTJAX_DATA and the cache, both empty; the data set "right"."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    monkeypatch.setenv("GPTJAX_DATA", str(data_dir))
    monkeypatch.setenv("GPTJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("GPTJAX_OFFLINE", raising=False)
    entry = datasets.DatasetFile("right.txt", len(BODY), HASH, "http://127.0.0.1:9/")
    monkeypatch.setitem(datasets.DATASETS, "right", entry)
    return data_dir, tmp_path / "home" / "data"


def use_server(monkeypatch, url):
    entry = dataclasses.replace(datasets.DATASETS["right"], url=url)
    monkeypatch.setitem(datasets.DATASETS, "right", entry)


@pytest.mark.fast
def test_a_download_is_verified_and_cached(places, monkeypatch):
    _, cache = places

    with serving(file(BODY)) as (url, asked):
        use_server(monkeypatch, url)
        paths = {datasets.fetch_dataset("right") for _ in range(3)}

    assert paths == {cache / "right.txt"}
    assert (cache / "right.txt").read_bytes() == BODY
    assert len(asked) == 1
    assert [path.name for path in cache.iterdir()] == ["right.txt"]
    assert stat.S_IMODE((cache / "right.txt").stat().st_mode) == 0o644


def stall(handler):
    head(handler, Content_Length=len(BODY))
    handler.wfile.write(BODY[:-1])
    handler.wfile.flush()
    handler.connection.settimeout(5)
    handler.connection.recv(1)  # until the client has given up


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (plain(BODY[:-1]), HASH),
        (plain(b"X" + BODY[1:]), HASH),
        (plain(b"", Content_Length=0), HASH),
        (file(BODY, cut=100), "right.txt"),
        (plain(BODY + b"X"), f"{len(BODY)} bytes"),
        (endless, f"{len(BODY)} bytes"),
        (plain(b"<html>", 404), "404"),
        (plain(b"", 503), "503"),
        (stall, "timed out"),
    ],
)
def test_a_failed_download_leaves_nothing(places, monkeypatch, answer, message):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_SECONDS", 0.1)
    _, cache = places

    with serving(answer) as (url, _):
        use_server(monkeypatch, url)
        with pytest.raises(DataError, match=message) as error:
            datasets.fetch_dataset("right")

    assert f"copy the file yourself to {cache / 'right.txt'}" in str(error.value)
    assert list(cache.iterdir()) == []


def test_an_unreachable_server_is_an_error(places):
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/"):
        datasets.fetch_dataset("right")


@pytest.mark.fast
def test_offline_forbids_downloads_but_not_local_files(places, monkeypatch):
    data_dir, _ = places
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")

    with serving(file(BODY)) as (url, asked):
        use_server(monkeypatch, url)
        with pytest.raises(DataError, match="GPTJAX_OFFLINE"):
            datasets.fetch_dataset("right")
        (data_dir / "right.txt").write_bytes(BODY)
        assert datasets.fetch_dataset("right") == data_dir / "right.txt"

    assert asked == []


@pytest.mark.fast
def test_local_files_are_found_in_order_and_verified(places):
    data_dir, cache = places
    cache.mkdir(parents=True)
    wrong = b"x" * len(BODY)

    for folder in (cache, data_dir):
        path = folder / "right.txt"
        path.write_bytes(BODY)
        assert datasets.fetch_dataset("right") == path
        path.write_bytes(wrong)
        message = f"{path} .*{hashlib.sha256(wrong).hexdigest()}.*{HASH}"
        with pytest.raises(DataError, match=message):
            datasets.fetch_dataset("right")
        path.write_bytes(BODY)


def test_an_unknown_name_is_answered_with_the_nearest(places):
    with pytest.raises(DataError, match="tinyshakespeare"):
        datasets.fetch_dataset("tinyshakespear")


def test_the_pins_are_those_of_the_real_files(shared_data, monkeypatch):
    monkeypatch.setenv("GPTJAX_DATA", str(shared_data))

    for name, entry in datasets.DATASETS.items():
        assert datasets.fetch_dataset(name) == shared_data / entry.file_name
        assert entry.url.startswith("https://")


def test_pythons_help_texts_are_always_the_same():
    texts = datasets.read_python_help()

    assert sum(map(len, texts)) > 300_000
    assert all(texts)
    assert texts == datasets.read_python_help()
