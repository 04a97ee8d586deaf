"""A named data set is the pinned file or an error, never anything else."""

import contextlib
import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptjax.data import datasets
from gptjax.errors import DataError
from gptjax.fileio import download

RIGHT = b"the right text\n" * 9000


@pytest.fixture
def places(tmp_path, monkeypatch):
    """(the user's folder, the cache), both empty, and no network settings."""
    own, home = tmp_path / "own", tmp_path / "home"
    own.mkdir()
    monkeypatch.setenv("GPTJAX_DATA", str(own))
    monkeypatch.setenv("GPTJAX_HOME", str(home))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("GPTJAX_OFFLINE", raising=False)
    entry = datasets.DatasetFile(
        "right.txt", len(RIGHT), hashlib.sha256(RIGHT).hexdigest(), "http://127.0.0.1:9/"
    )
    monkeypatch.setitem(datasets.DATASETS, "right", entry)
    return own, home / "data"


@contextlib.contextmanager
def serving(
    monkeypatch, body: bytes, *, length: int | None = None, status: int = 200, stalls: bool = False
):
    """A server that answers everything with `body`; yields the paths asked for."""
    asked, over = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
            if stalls:
                over.wait()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/right.txt"
        entry = dataclasses.replace(datasets.DATASETS["right"], url=url)
        monkeypatch.setitem(datasets.DATASETS, "right", entry)
        try:
            yield asked
        finally:
            over.set()
            server.shutdown()
            thread.join()


def files(folder: Path) -> Iterator[str]:
    """Names of all files below the folder."""
    return (path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.fast
def test_a_download_is_checked_and_kept(places, monkeypatch):
    _, cache = places

    with serving(monkeypatch, RIGHT, length=len(RIGHT)) as asked:
        paths = {datasets.fetch_dataset("right") for _ in range(3)}

    assert paths == {cache / "right.txt"}
    assert (cache / "right.txt").read_bytes() == RIGHT
    assert asked == ["/right.txt"]
    assert list(files(cache)) == ["right.txt"]


@pytest.mark.parametrize(
    ("body", "length", "status", "message"),
    [
        (RIGHT[:-1], None, 200, "pinned hash: 134999 bytes"),
        (b"X" + RIGHT[1:], None, 200, "with sha256 .*, expected 135000 bytes with"),
        (RIGHT * 20, None, 200, "pinned hash: 135001 bytes"),
        (RIGHT + b"\n", len(RIGHT) + 1, 200, "pinned hash: 135001 bytes"),
        (b"", 0, 200, "pinned hash: 0 bytes"),
        (b"<html>", None, 404, "cannot download .* 404"),
        (b"", None, 503, "cannot download .* 503"),
    ],
)
def test_a_wrong_download_leaves_nothing(places, monkeypatch, body, length, status, message):
    _, cache = places

    with (
        serving(monkeypatch, body, length=length, status=status),
        pytest.raises(DataError, match=message) as error,
    ):
        datasets.fetch_dataset("right")

    assert f"copy the file yourself to {cache / 'right.txt'}" in str(error.value)
    assert list(files(cache)) == []


def test_no_server_is_an_error_that_says_what_to_do(places):
    with pytest.raises(DataError, match=r"cannot download http://127.*Check the network"):
        datasets.fetch_dataset("right")


def test_a_stalled_server_is_given_up(places, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_SECONDS", 0.05)

    with (
        serving(monkeypatch, RIGHT[:-1], length=len(RIGHT), stalls=True),
        pytest.raises(DataError, match=r"cannot download .*timed out"),
    ):
        datasets.fetch_dataset("right")

    assert list(files(places[1])) == ["right.txt.part"]


def test_an_interrupted_download_is_an_error_and_goes_on_next_time(places, monkeypatch):
    _, cache = places

    with serving(monkeypatch, RIGHT[:-1], length=len(RIGHT)):
        with pytest.raises(DataError, match="ended after 134999 of 135000") as error:
            datasets.fetch_dataset("right")
        assert f"copy the file yourself to {cache / 'right.txt'}" in str(error.value)
        assert list(files(cache)) == ["right.txt.part"]
    with serving(monkeypatch, RIGHT):
        datasets.fetch_dataset("right")

    assert list(files(cache)) == ["right.txt"]


def test_a_leftover_part_is_never_taken_for_the_file(places, monkeypatch):
    _, cache = places
    cache.mkdir(parents=True)
    (cache / "right.txt.part").write_bytes(b"x" * len(RIGHT))

    with serving(monkeypatch, RIGHT) as asked:
        assert datasets.fetch_dataset("right").read_bytes() == RIGHT

    assert len(asked) == 1


@pytest.mark.fast
def test_offline_forbids_the_download_but_not_what_is_there(places, monkeypatch):
    own, _ = places
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")

    with serving(monkeypatch, RIGHT) as asked:
        with pytest.raises(DataError, match=r"GPTJAX_OFFLINE disables.*Unset GPTJAX_OFF"):
            datasets.fetch_dataset("right")
        (own / "right.txt").write_bytes(RIGHT)
        assert datasets.fetch_dataset("right") == own / "right.txt"

    assert asked == []


def test_the_users_folder_comes_before_the_cache(places):
    own, cache = places
    cache.mkdir(parents=True)
    for folder in (cache, own):
        (folder / "right.txt").write_bytes(RIGHT)
        assert datasets.fetch_dataset("right") == folder / "right.txt"


@pytest.mark.fast
def test_a_wrong_file_on_this_machine_is_named_with_both_hashes(places, monkeypatch):
    own, cache = places
    cache.mkdir(parents=True)
    wrong = b"x" * len(RIGHT)
    hashes = hashlib.sha256(wrong).hexdigest(), hashlib.sha256(RIGHT).hexdigest()

    for folder in (cache, own):
        (folder / "right.txt").write_bytes(wrong)
        with pytest.raises(DataError, match="{}.*{}.*remove".format(*hashes)) as error:
            datasets.fetch_dataset("right")
        assert str(folder / "right.txt") in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest(places):
    with pytest.raises(DataError, match=r"'tinyshakespear'. Did you mean tinyshakespeare"):
        datasets.fetch_dataset("tinyshakespear")


def test_the_pins_are_those_of_the_real_files(shared_data, monkeypatch):
    monkeypatch.setenv("GPTJAX_DATA", str(shared_data))

    for name, entry in datasets.DATASETS.items():
        assert datasets.fetch_dataset(name) == shared_data / entry.file_name


def test_every_download_is_over_https():
    assert all(e.url.startswith("https://") for e in datasets.DATASETS.values())


def test_pythons_help_is_much_english_and_always_the_same():
    texts = datasets.read_python_help()

    assert sum(map(len, texts)) > 300_000
    assert all(texts)
    assert texts == datasets.read_python_help()
