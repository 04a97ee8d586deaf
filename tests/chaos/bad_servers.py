"""Downloads from bad servers, killed at every point: never a wrong file is used.

In each case a process downloads a data set (with pooch) or a model (with
huggingface_hub) from one of the servers and kills itself at a point; then another call
asks the same server, and a last one a server that is right. Each call gives the right
file or an error.
"""

import contextlib
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gptjax.errors import DataError, ModelError
from gptjax.fileio import download
from gptjax.fileio.download import Pin, download_file, sha256_of_files
from gptjax.weights import hub
from tests.file_server import (
    BODY,
    COMMIT,
    PIN,
    Answer,
    Handler,
    endless,
    file,
    head,
    hub_headers,
    plain,
    serving,
    use_hub,
)

WRONG = bytes(reversed(BODY))
NUM_RECEIVES = 8  # kills at a receive, then before and after each of two renames
NUM_POINTS = NUM_RECEIVES + 4
STALL_SECONDS = 0.3
CHILD = """
import itertools, os, signal, socket, sys
from pathlib import Path
from tests.chaos import bad_servers
client, url, folder, point = sys.argv[1:]
count = itertools.count()
def at(number):
    if number == int(point):
        os.kill(os.getpid(), signal.SIGKILL)
def watch(owner, name, before, after):
    real = getattr(owner, name)
    def watched(*args, **options):
        at(before())
        result = real(*args, **options)
        at(after())
        return result
    setattr(owner, name, watched)
for name in ("recv", "recv_into"):
    watch(socket.socket, name, lambda: next(count), lambda: -1)
first = bad_servers.NUM_RECEIVES
for number, name in enumerate(("rename", "replace")):
    place = first + 2 * number
    watch(os, name, lambda place=place: place, lambda place=place: place + 1)
bad_servers.fetch(client, url, Path(folder))
"""


def stalled(handler: Handler) -> None:
    """Sends half of the body, then nothing."""
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
    "wrong length": plain(BODY + b"more", Content_Length=len(BODY) + 4),
    "another file": file(WRONG),
    "stalled": stalled,
    "endless": endless,
}
CASES = [
    (client, name, point)
    for client, name, point in itertools.product(("dataset", "hub"), SERVERS, range(NUM_POINTS))
    if (client, name) != ("hub", "endless")  # the library sets no limit
]
FULL, SLICE = len(CASES), 26


def as_hub(answer: Answer) -> Answer:
    """A hub with the headers of the right weights, which an answer then sends."""

    def respond(handler: Handler) -> None:
        name = handler.path.rpartition("/")[2]
        if name != hub.WEIGHTS:
            file(b"{}", **hub_headers(name, b"{}"))(handler)
        elif handler.command == "HEAD":
            head(handler, Content_Length=len(BODY), **hub_headers(name, BODY))
        else:
            answer(handler)

    return respond


def fetch(client: str, url: str, folder: Path) -> Path:
    """Fetches the file; an error if that fails."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(monkeypatch, folder, url)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", STALL_SECONDS)
        monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_SECONDS", STALL_SECONDS)
        if client == "dataset":
            if not (folder / "file").exists():
                download_file(url, PIN, folder / "file", "it")
            return folder / "file"
        empty = Pin(2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
        pins = {hub.CONFIG: empty, hub.VOCAB: empty, hub.MERGES: empty, hub.WEIGHTS: PIN}
        monkeypatch.setitem(hub.PINNED_REPOS, "gpt2", hub.Repository("o/n", COMMIT, pins))
        return hub.fetch_repo("gpt2") / hub.WEIGHTS


def kill_at(client: str, url: str, folder: Path, point: int) -> int:
    """The exit status of a process that kills itself at a point of a fetch."""
    command = [sys.executable, "-c", CHILD, client, url, str(folder), str(point)]
    return subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=900
    ).returncode


def faults(client: str, name: str, point: int, folder: Path) -> Iterator[str]:
    """Yields the faults of one case."""

    def call(url: str, when: str, *, must: bool = False) -> Iterator[str]:
        try:
            if sha256_of_files([fetch(client, url, folder)]) != PIN.sha256:
                yield f"{when}: a wrong file is used"
        except (DataError, ModelError) as error:
            if "Delete " in str(error):  # do what it says
                Path(str(error).partition("Delete ")[2].split(" to ")[0]).unlink()
            if must:
                yield f"{when}: {error}"

    with contextlib.ExitStack() as stack:
        answers = [SERVERS[name], file(BODY)]
        if client == "hub":
            answers = list(map(as_hub, answers))
        url, good = (stack.enter_context(serving(answer))[0] for answer in answers)
        status = kill_at(client, url, folder, point)
        if name == "right" and status not in (0, -signal.SIGKILL):
            yield f"it ended with {status} before the point"
        yield from call(url, "second call", must=name == "right")
        yield from call(good, "right server", must=name not in ("flipped", "another file"))
        yield from call(good, "at the end", must=True)


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each case; the seed does not matter."""
    order = sorted(range(FULL), key=lambda n: (n * 7919) % FULL)  # a slice has all kinds
    for case in cases:
        client, name, point = CASES[order[case]]
        place = folder / str(case)
        place.mkdir()
        try:
            found = "; ".join(faults(client, name, point, place))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        yield f"{client}, {name}, point {point}: {found}" if found else ""
