"""Downloads from bad servers, killed at every point: never a wrong file is used.

A process downloads a data set (with pooch) or a model (with huggingface_hub) and kills
itself at a point; then another call asks the same server, and a last one a right one.
"""

import contextlib
import hashlib
import itertools
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjax.errors import GptjaxError
from gptjax.fileio import download
from gptjax.fileio.download import Pin, download_file, sha256_of_files
from gptjax.weights import hub
from tests import servers
from tests.chaos._disturbed import ignore, killer, watch
from tests.chaos._runs import run_jobs
from tests.servers import BODY, PIN, Answer, Handler, file, head, hub_headers, serving

NUM_RECEIVES = 8  # kills at a receive, then before and after each of two renames
STALL_SECONDS = 0.3
SMALL_FILES = (hub.CONFIG, hub.VOCAB, hub.MERGES)
EMPTY = Pin(2, hashlib.sha256(b"{}").hexdigest())


def stalled(handler: Handler) -> None:
    head(handler, Content_Length=len(BODY))
    with contextlib.suppress(OSError):
        handler.wfile.write(BODY[: len(BODY) // 2])
        handler.wfile.flush()
        handler.connection.settimeout(5)
        handler.connection.recv(1)  # until the client has gone


SERVERS: dict[str, Answer] = {
    "right": file(BODY),
    "truncated": file(BODY, cut=len(BODY) * 2 // 3),
    "flipped": file(BODY[:-100] + b"X" + BODY[-99:]),
    "wrong length": servers.plain(BODY + b"more", Content_Length=len(BODY) + 4),
    "another file": file(bytes(reversed(BODY))),
    "stalled": stalled,
    "endless": servers.endless,
}
CASES = [
    (client, name, point)
    for point, client, name in itertools.product(
        range(NUM_RECEIVES + 4), ("dataset", "hub"), SERVERS
    )
    if (client, name) != ("hub", "endless")  # the library sets no limit
]
FULL, SLICE = len(CASES), 13


def as_hub(answer: Answer) -> Answer:
    """A hub with the headers of the right weights, which an answer then sends."""

    def send_weights(handler: Handler) -> None:
        if handler.command == "HEAD":
            head(handler, Content_Length=len(BODY), **hub_headers(hub.WEIGHTS, BODY))
        else:
            answer(handler)

    return servers.hub({**dict.fromkeys(SMALL_FILES, b"{}"), hub.WEIGHTS: send_weights})


def fetch(client: str, url: str, folder: Path, point: int | None = None) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        servers.use_hub(monkeypatch, folder, url)
        monkeypatch.setattr("time.sleep", ignore)  # between retries
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", STALL_SECONDS)
        monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_SECONDS", STALL_SECONDS)
        if point is not None:
            kill_at(point)
        if client == "dataset":
            if not (folder / "file").exists():
                download_file(url, PIN, folder / "file", "it")
            return folder / "file"
        pins = {**dict.fromkeys(SMALL_FILES, EMPTY), hub.WEIGHTS: PIN}
        monkeypatch.setitem(hub.PINNED_REPOS, "gpt2", hub.Repository("o/n", servers.COMMIT, pins))
        return hub.fetch_repo("gpt2") / hub.WEIGHTS


def kill_at(point: int) -> None:
    pass_receive = killer(point, itertools.count())
    pass_rename = killer(point, itertools.count(NUM_RECEIVES))
    for name in ("recv", "recv_into"):
        watch(socket.socket, name, pass_receive)
    for name in ("rename", "replace"):
        watch(os, name, pass_rename, pass_rename)


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    def check(case: int, rng: random.Random) -> str:
        client, name, point = CASES[case]
        place = folder / str(case)
        place.mkdir()
        answers = [SERVERS[name], file(BODY)]
        with contextlib.ExitStack() as stack:
            if client == "hub":
                answers = list(map(as_hub, answers))
            bad, good = (stack.enter_context(serving(answer))[0] for answer in answers)
            said = run_jobs((fetch, client, bad, place, point))
            calls = [(bad, name == "right"), (good, name not in ("flipped", "another file"))]
            faults = [call(client, url, place, must) for url, must in (*calls, (good, True))]
        if name == "right" and isinstance(said, str):
            faults.append(f"before the point: {said}")
        fault = "; ".join(filter(None, faults))
        return fault and f"{client}, {name}, point {point}: {fault}"

    return check


def call(client: str, url: str, folder: Path, must: bool) -> str:
    try:
        is_right = sha256_of_files([fetch(client, url, folder)]) == PIN.sha256
        return "" if is_right else "a wrong file is used"
    except GptjaxError as error:
        if "Delete " in str(error):  # do what it says
            Path(str(error).partition("Delete ")[2].split(" to ")[0]).unlink()
        return str(error) if must else ""
