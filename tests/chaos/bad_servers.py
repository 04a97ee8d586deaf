"""Downloads from bad servers, killed at every point: never a wrong file installed.

Of each case, a process downloads from one of the servers and kills itself at a point;
then another call asks the same server, and a last one a server that is right. After
each, the file's name holds the right file or nothing.
"""

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.errors import DataError
from gptjax.fileio import download
from gptjax.fileio.download import RemoteFile
from tests.file_server import (
    BODY,
    PIN,
    Answer,
    Handler,
    endless,
    file,
    head,
    plain,
    process_of,
    serving,
)

POINTS = 20  # blocks of the body, then before and after three operations
BLOCKS = 14
WRONG = bytes(reversed(BODY))
SILENT = 0.3  # seconds that the server which stalls is waited for
KILLER = """
import http.client
from gptjax.fileio import download as module
module.DOWNLOAD_TIMEOUT_SECONDS, module.DOWNLOAD_BLOCK_BYTES = {seconds}, {block}
point, blocks = {point}, {blocks}
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def at(owner, name, first):
    real = getattr(owner, name)
    def wrapped(*args, **options):
        if point == first:
            die()
        result = real(*args, **options)
        if point == first + 1:
            die()
        return result
    setattr(owner, name, wrapped)
at(os, 'fsync', blocks)
at(module, 'sha256_of_files', blocks + 2)
at(os, 'replace', blocks + 4)
real, count = http.client.HTTPResponse.read1, [0]
def read1(*args):
    if point == count[0]:
        die()
    count[0] += 1
    return real(*args)
http.client.HTTPResponse.read1 = read1
"""


def flipped(body: bytes) -> bytes:
    """The body with one bit changed."""
    return body[:-100] + bytes([body[-100] ^ 4]) + body[-99:]


def stalled(handler: Handler) -> None:
    """Half of the body, then nothing."""
    head(handler, Content_Length=len(BODY))
    with contextlib.suppress(OSError):
        handler.wfile.write(BODY[: len(BODY) // 2])
        handler.wfile.flush()
        handler.connection.settimeout(5)
        handler.connection.recv(1)  # until the other side has gone


def redirect_to(url: str) -> Answer:
    """An answer that sends to another place."""
    return lambda handler: head(handler, 302, Location=url, Content_Length=0)


SERVERS: dict[str, Answer] = {
    "right": file(BODY),
    "truncated": file(BODY, cut=len(BODY) * 2 // 3),
    "flipped": file(flipped(BODY)),
    "wrong length": plain(BODY + b"more", Content_Length=len(BODY) + 4),
    "redirect": redirect_to(""),  # to the address of a server of another file
    "endless": endless,
    "stalled": stalled,
}
FULL, SLICE = len(SERVERS) * POINTS, len(SERVERS) * 3


def fault_of(target: Path, when: str, *, must: bool = False) -> str:
    """What is wrong with what lies under the file's name, or ""."""
    if not target.exists():
        return f"{when}: the right file was not installed" if must else ""
    return "" if target.read_bytes() == BODY else f"{when}: a wrong file is installed"


def killed(url: str, target: Path, point: int) -> int:
    """The exit status of a download that is killed at a point, if it gets there."""
    block = len(BODY) // BLOCKS + 1
    options = {"seconds": download.DOWNLOAD_TIMEOUT_SECONDS, "block": block, "blocks": BLOCKS}
    process = process_of(url, target, KILLER.format(point=point, **options))
    try:
        return process.wait(900)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 1000


def faults(name: str, point: int, target: Path) -> Iterator[str]:
    """What goes wrong with one server and one point, "" where nothing does."""
    with contextlib.ExitStack() as stack:
        answer = SERVERS[name]
        if name == "redirect":
            other, _ = stack.enter_context(serving(file(WRONG)))
            answer = redirect_to(other)
        url, _ = stack.enter_context(serving(answer))
        status = killed(url, target, point)
        yield "the download never ended" if status == 1000 else ""
        if name == "right" and status != -signal.SIGKILL:
            yield f"it ended with {status} before the point"
        yield fault_of(target, "after the kill")
        try:
            download.download_file(RemoteFile(url, PIN), target, "it")
        except DataError as error:
            done = name == "right" or target.exists()
            yield f"after all was there: {error}" if done else ""
        yield fault_of(target, "after the second call")
        good, _ = stack.enter_context(serving(file(BODY)))
        if not target.exists():
            download.download_file(RemoteFile(good, PIN), target, "it")
        yield fault_of(target, "at the end", must=True)
        left = sorted(path.name for path in target.parent.iterdir())
        left = [part for part in left if part != target.name]
        yield f"left behind: {left}" if left else ""


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each case; the seed does not matter."""
    before = download.DOWNLOAD_TIMEOUT_SECONDS
    names = list(SERVERS)
    spread = [0, 9, 19, *(n for n in range(POINTS) if n not in (0, 9, 19))]
    try:
        for case in cases:
            name, point = names[case % len(names)], spread[case // len(names)]
            place = folder / str(case)
            place.mkdir()
            download.DOWNLOAD_TIMEOUT_SECONDS = SILENT if name == "stalled" else before
            try:
                found = [f for f in faults(name, point, place / "file") if f]
                yield "; ".join(f"{name}, point {point}: {fault}" for fault in found)
            except Exception as error:
                yield f"{name}, point {point}: {type(error).__name__}: {error}"
    finally:
        download.DOWNLOAD_TIMEOUT_SECONDS = before
