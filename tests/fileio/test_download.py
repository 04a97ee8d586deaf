"""A download is the right file or an error, whatever the server or the machine does."""

import hashlib
import io
import re
import signal
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from gptjax.errors import DataError
from gptjax.fileio import download as module
from gptjax.fileio.download import (
    RemoteFile,
    RemoteFileNotFoundError,
    download_file,
    open_part,
    part_path,
)
from tests.file_server import (
    BODY,
    HALF,
    HASH,
    PIN,
    Handler,
    endless,
    file,
    head,
    held,
    plain,
    process_of,
    serving,
)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Where the file has to come, in a folder that is not there yet."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("GPTJAX_OFFLINE", raising=False)
    return tmp_path / "cache" / "file"


def names(target: Path) -> list[str]:
    """All files beside the target."""
    return sorted(path.name for path in target.parent.glob("*"))


@pytest.mark.fast
@pytest.mark.parametrize("pin", [PIN, None])
def test_a_file_comes_once_with_its_hash_and_leaves_nothing_else(target, pin):
    with serving(file(BODY, '"a"')) as (url, asked):
        assert download_file(RemoteFile(url, pin), target, "it") == HASH

    assert target.read_bytes() == BODY
    assert names(target) == ["file"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (plain(BODY[:-1]), "pinned hash: 204799 bytes with sha256"),
        (plain(b"X" + BODY[1:]), f"pinned hash: 204800 bytes with .* expected .*{HASH}"),
        (plain(b"X" + BODY[1:], Content_Length=len(BODY)), "pinned hash: 204800 bytes"),
        (plain(BODY, Content_Length=len(BODY) - 1), "pinned hash: 204799 bytes, expected"),
        (plain(BODY * 2, Content_Length=2 * len(BODY)), "pinned hash: 409600 bytes, exp"),
        (plain(BODY + b"!"), "pinned hash: 204801 bytes or more, expected 204800 bytes"),
        (endless, "pinned hash: 204801 bytes or more, expected"),
        (plain(b""), "pinned hash: 0 bytes with"),
        (plain(BODY, 204), "cannot download .* status 204"),
        (plain(BODY, 206), "cannot download .* status 206"),
        (plain(BODY, 404), "cannot download .* 404"),
        (plain(BODY, 500), "cannot download .* 500"),
        (plain(BODY, Content_Encoding="gzip"), "cannot download .* Content-Encoding gzip"),
        (plain(BODY, 302, Location="file:///etc/passwd"), "cannot download .*allowed"),
        (plain(BODY, 302, Location="ftp://127.0.0.1/"), "from http to ftp"),
        (plain(BODY, 302, Location="/again"), "cannot download .* infinite loop"),
    ],
)
def test_a_wrong_answer_leaves_nothing_and_says_what_to_do(target, answer, message):
    with serving(answer) as (url, _), pytest.raises(DataError, match=message) as error:
        download_file(RemoteFile(url, PIN), target, "it")

    assert isinstance(error.value, RemoteFileNotFoundError) == ("404" in message)
    assert re.search(r"Try again|try again", str(error.value))
    assert f"copy the file yourself to {target}" in str(error.value)
    assert names(target) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (plain(BODY), "no Content-Length"),
        (plain(BODY, Content_Length="many"), "no Content-Length"),
        (plain(BODY, Content_Length=len(BODY)), "has 204,800 bytes, more than 204,799"),
        (plain(BODY[:9], Content_Length=10), "connection ended after 9 of 10 bytes"),
    ],
)
def test_without_a_pin_the_length_is_needed_and_holds(target, answer, message):
    with (
        serving(answer) as (url, _),
        pytest.raises(DataError, match=f"cannot download {url}: .*{message}"),
    ):
        download_file(RemoteFile(url, max_bytes=len(BODY) - 1), target, "it")

    assert not target.exists()


@pytest.mark.fast
@pytest.mark.parametrize("pin", [PIN, None])
@pytest.mark.parametrize("cut", [1, HALF, len(BODY) - 1])
def test_after_an_interruption_no_byte_is_downloaded_again(target, pin, cut):
    with serving(file(BODY, '"a"', cut), file(BODY, '"a"')) as (url, asked):
        with pytest.raises(DataError, match=f"ended after {cut} of 204800.*resume after"):
            download_file(RemoteFile(url, pin), target, "it")
        assert not target.exists()
        assert download_file(RemoteFile(url, pin), target, "it") == HASH

    assert target.read_bytes() == BODY
    assert names(target) == ["file"]
    assert [request.range for request in asked] == [None, f"bytes={cut}-"]
    assert asked[1].headers.get("if-range") == (None if pin else '"a"')


def test_a_stalled_server_is_given_up_and_what_came_is_kept(target, monkeypatch):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT_SECONDS", 0.1)
    go_on = threading.Event()

    with serving(held(HALF, threading.Event(), go_on), file(BODY)) as (url, asked):
        with pytest.raises(DataError, match=r"cannot download .*timed out"):
            download_file(RemoteFile(url, PIN), target, "it")
        go_on.set()
        assert names(target) == ["file.part"]
        download_file(RemoteFile(url, PIN), target, "it")

    assert target.read_bytes() == BODY
    assert asked[1].range == f"bytes={HALF}-"


@pytest.mark.parametrize("etag", [None, 'W/"a"', "a"])
def test_without_a_pin_or_a_strong_name_it_starts_over(target, etag):
    with serving(file(BODY, etag, HALF), file(BODY, etag)) as (url, asked):
        with pytest.raises(DataError, match=r"Check the network and try again\. Or copy"):
            download_file(RemoteFile(url), target, "it")
        assert download_file(RemoteFile(url), target, "it") == HASH

    assert [request.range for request in asked] == [None, None]


@pytest.mark.parametrize("etag", ['"a"', '"b"'])  # a liar keeps the name
def test_a_file_that_has_changed_is_not_glued_to_its_old_start(target, etag):
    new = bytes(reversed(BODY)) + b"longer"

    with serving(file(BODY, '"a"', HALF), file(new, etag)) as (url, _):
        with pytest.raises(DataError, match="resume after 102,400 bytes"):
            download_file(RemoteFile(url), target, "it")
        download_file(RemoteFile(url), target, "it")

    assert target.read_bytes() == new
    assert names(target) == ["file"]


RANGE = f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}"


STRANGE = [
    plain(BODY, 200, Content_Length=len(BODY)),
    plain(b"", 416),
    plain(BODY[HALF:], 206, ETag='"a"'),
    plain(BODY, 206, ETag='"a"', Content_Range=f"bytes 0-{len(BODY) - 1}/*"),
    plain(BODY[1:], 206, ETag='"a"', Content_Range=RANGE.replace("1", "2")),
    plain(BODY, 206, ETag='"a"', Content_Range=RANGE, Content_Length=len(BODY)),
]
OTHER = plain(BODY[HALF:], 206, ETag='"b"', Content_Range=RANGE)


@pytest.mark.parametrize(("answer", "pin"), [*product(STRANGE, [PIN, None]), (OTHER, None)])
def test_a_strange_answer_to_going_on_starts_over(target, answer, pin):
    with serving(file(BODY, '"a"', HALF), answer, file(BODY)) as (url, asked):
        with pytest.raises(DataError, match="connection ended"):
            download_file(RemoteFile(url, pin), target, "it")
        assert download_file(RemoteFile(url, pin), target, "it") == HASH

    assert [request.range for request in asked] == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize(
    ("part", "requests"),
    [
        (BODY, 0),  # killed before it got its name
        (b"X" + BODY[1:HALF], 2),
        (b"X" + BODY[1:], 1),
        (BODY + b"X", 1),
    ],
)
def test_a_leftover_part_is_used_only_if_the_whole_is_right(target, part, requests):
    target.parent.mkdir()
    part_path(target).write_bytes(part)

    with serving(file(BODY)) as (url, asked):
        assert download_file(RemoteFile(url, PIN), target, "it") == HASH

    assert target.read_bytes() == BODY
    assert names(target) == ["file"]
    assert len(asked) == requests


@pytest.mark.parametrize("note", ["", "[" * 10**5, '{"etag": 1}', "[]"])
def test_a_leftover_part_with_a_damaged_note_is_not_used(target, note):
    target.parent.mkdir()
    part_path(target).write_bytes(BODY[:HALF])
    module.note_path(part_path(target)).write_text(note)

    with serving(file(BODY)) as (url, asked):
        assert download_file(RemoteFile(url), target, "it") == HASH

    assert [request.range for request in asked] == [None]
    assert names(target) == ["file"]


@pytest.mark.parametrize("sent", [0, 1, HALF, len(BODY) - 1, len(BODY)])
def test_a_kill_never_leaves_a_wrong_file(target, sent):
    reached, go_on = threading.Event(), threading.Event()

    with serving(held(sent, reached, go_on), file(BODY)) as (url, _):
        process = process_of(url, target)
        assert reached.wait(30)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        go_on.set()
        assert not target.exists() or target.read_bytes() == BODY
        assert download_file(RemoteFile(url, PIN), target, "it") == HASH

    assert target.read_bytes() == BODY
    assert names(target) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_the_end_costs_no_second_download(target, call, when):
    before = (
        f"real = os.{call}\n"
        f"def {call}(*args):\n"
        f"    if {when == 'after'}: real(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"os.{call} = {call}"
    )

    with serving(file(BODY)) as (url, asked):
        assert process_of(url, target, before).wait(30) == -signal.SIGKILL
        assert target.exists() == ((call, when) == ("replace", "after"))
        assert download_file(RemoteFile(url, PIN), target, "it") == HASH

    assert target.read_bytes() == BODY
    assert names(target) == ["file"]
    assert len(asked) == 1


def test_of_calls_at_once_one_downloads_and_the_others_wait(target):
    reached, go_on = threading.Event(), threading.Event()

    with serving(held(HALF, reached, go_on)) as (url, asked):
        process = process_of(url, target)
        assert reached.wait(30)
        with ThreadPoolExecutor(3) as pool:
            remotes = [RemoteFile(url, PIN), RemoteFile(url, PIN), RemoteFile(url)]
            hashes = [pool.submit(download_file, r, target, "it") for r in remotes]
            time.sleep(0.1)
            assert not any(found.done() for found in hashes)
            go_on.set()
            assert [found.result(30) for found in hashes] == [HASH] * 3
        assert process.wait(30) == 0

    assert target.read_bytes() == BODY
    assert names(target) == ["file"]
    assert len(asked) == 1


@pytest.mark.parametrize("came", [0, HALF])
def test_a_call_that_waited_goes_on_where_the_other_stopped(target, came):
    with serving(file(BODY)) as (url, asked), ThreadPoolExecutor(1) as pool:
        with open_part(target) as part:
            waiting = pool.submit(download_file, RemoteFile(url, PIN), target, "it")
            time.sleep(0.1)
            part.write(BODY[:came])
        assert waiting.result(30) == HASH

    assert [request.range for request in asked] == [f"bytes={HALF}-" if came else None]


@pytest.mark.fast
def test_offline_nothing_is_asked(target, monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")

    with (
        serving(file(BODY)) as (url, asked),
        pytest.raises(DataError, match=r"^the set x is not .*_OFFLINE disables.*Unset G"),
    ):
        download_file(RemoteFile(url, PIN), target, "the set x")

    assert not asked
    assert not target.parent.exists()


def test_a_file_that_is_there_is_not_replaced(target):
    target.parent.mkdir()
    target.write_bytes(b"mine")

    with serving(file(BODY)) as (url, asked):
        with pytest.raises(DataError, match=f"{target} .* pinned hash.* or remove"):
            download_file(RemoteFile(url, PIN), target, "it")
        found = download_file(RemoteFile(url), target, "it")

    assert found == hashlib.sha256(b"mine").hexdigest()
    assert names(target) == ["file"]
    assert not asked


def test_a_redirect_is_followed_and_its_body_is_not_read(target):
    def away(handler: Handler) -> None:
        head(handler, 302, Location="/there")
        while True:
            handler.wfile.write(BODY)

    with serving(away, file(BODY)) as (url, asked):
        assert download_file(RemoteFile(url, PIN), target, "it") == HASH

    assert [request.path for request in asked] == ["/file", "/there"]


def redirected(old: str, new: str, token: str = "") -> urllib.request.Request | None:
    request = urllib.request.Request(old)
    if token:
        request.add_unredirected_header("Authorization", token)
    body = io.BytesIO()
    return module.SafeRedirectHandler().redirect_request(request, body, 302, "Found", {}, new)


@pytest.mark.parametrize(
    ("old", "new"), [("https", "http"), ("https", "ftp"), ("http", "ftp"), ("http", "file")]
)
def test_no_redirect_leads_to_what_is_less_safe(old, new):
    with pytest.raises(OSError, match=f"from {old} to {new}"):
        redirected(f"{old}://a.example/x", f"{new}://a.example/x")


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        ("https://a.example/y", True),
        ("https://b.example/y", False),
        ("https://a.example:8443/y", False),
        ("https://a.example@b.example/y", False),
    ],
)
def test_a_token_stays_with_its_host(new, kept):
    request = redirected("https://a.example/x", new, "Bearer t")

    assert (request.get_header("Authorization") == "Bearer t") == kept
    assert "Authorization" not in request.headers  # those would go anywhere


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "http://[", "x:"])
def test_only_http_is_spoken(target, url):
    with pytest.raises(DataError, match="cannot download"):
        download_file(RemoteFile(url), target, "it")

    assert names(target) == []


def test_a_folder_that_cannot_be_written_is_not_the_networks_fault(target):
    target.parent.write_bytes(b"")

    with pytest.raises(DataError, match=r"Check that .*cache is writable"):
        download_file(RemoteFile("http://127.0.0.1:9/"), target, "it")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_only(target, monkeypatch, capsys, terminal):
    monkeypatch.setattr(module, "PROGRESS_BAR_SECONDS", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    with serving(file(BODY)) as (url, _):
        download_file(RemoteFile(url, PIN), target, "it")

    shown = capsys.readouterr()
    assert shown.out == ""
    assert (f"\rdownloading file [{'#' * 30}] 100%" in shown.err) == terminal
    assert bool(shown.err) == terminal
