"""A server on this machine, good, bad or slow, and a process that downloads from it."""

import contextlib
import dataclasses
import hashlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.fileio.download import Pin

BODY = bytes(range(256)) * 800  # more than one block
HALF = len(BODY) // 2
HASH = hashlib.sha256(BODY).hexdigest()
PIN = Pin(len(BODY), HASH)
Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request that the server got."""

    path: str
    headers: dict[str, str]  # names in lower case

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[tuple[str, list[Asked]]]:
    """A server of these answers, one each, the last one for ever."""
    asked: list[Asked] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): text for name, text in self.headers.items()}
            asked.append(Asked(self.path, headers))
            with contextlib.suppress(ConnectionError):
                answers[min(len(asked), len(answers)) - 1](self)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/file", asked
        finally:
            server.shutdown()
            thread.join()


def head(handler: Handler, status: int = 200, **headers: object) -> None:
    """Sends the status and headers; `Content_Length=5` for Content-Length: 5."""
    handler.send_response(status)
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), str(text))
    handler.end_headers()


def plain(body: bytes, status: int = 200, **headers: object) -> Answer:
    """The whole body, whatever was asked."""

    def answer(handler: Handler) -> None:
        head(handler, status, **headers)
        handler.wfile.write(body)

    return answer


def file(body: bytes, etag: str | None = None, cut: int | None = None) -> Answer:
    """What a good server answers, but it hangs up after `cut` bytes."""

    def answer(handler: Handler) -> None:
        start, named = 0, {"ETag": etag} if etag else {}
        if asked := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")):
            start = int(asked[1])
        if handler.headers.get("If-Range", etag) != etag:
            start = 0
        size = len(body)
        if start > 0 and start >= size:
            head(handler, 416, Content_Range=f"bytes */{size}", **named)
            return
        if start:
            named["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
        head(handler, 206 if start else 200, Content_Length=size - start, **named)
        handler.wfile.write(body[start:][:cut])

    return answer


def endless(handler: Handler) -> None:
    head(handler)
    while True:
        handler.wfile.write(BODY)


def held(sent: int, reached: threading.Event, go_on: threading.Event) -> Answer:
    """The body, with a stop after `sent` bytes."""

    def answer(handler: Handler) -> None:
        head(handler, Content_Length=len(BODY))
        handler.wfile.write(BODY[:sent])
        handler.wfile.flush()
        reached.set()
        go_on.wait(10)
        handler.wfile.write(BODY[sent:])

    return answer


def process_of(url: str, target: Path, before: str = "") -> subprocess.Popen:
    """A process that downloads the pinned file."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from gptjax.fileio.download import Pin, RemoteFile, download_file\n"
        f"{before}\n"
        f"pin = Pin({len(BODY)}, {HASH!r})\n"
        "download_file(RemoteFile(sys.argv[1], pin), Path(sys.argv[2]), 'it')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(target)], stderr=subprocess.DEVNULL
    )
