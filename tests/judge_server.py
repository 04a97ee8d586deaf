"""A judge on this machine that answers as OpenAI's and Ollama's do, or badly."""

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

from tests.file_server import Answer, Handler, head, plain


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request that the server got."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"]


@contextlib.contextmanager
def judging(*answers: Answer) -> Iterator[tuple[str, list[Asked]]]:
    """A server of these answers, one each, the last one for ever; its url's base."""
    asked: list[Asked] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): text for name, text in self.headers.items()}
            asked.append(Asked(self.path, headers, json.loads(body)))
            with contextlib.suppress(ConnectionError):
                answers[min(len(asked), len(answers)) - 1](self)

        do_GET = do_POST  # a client that follows a redirect gets as far

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()


def says(text: str | None) -> Answer:
    """A reply, in the form of OpenAI's chat completions."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return replies({"object": "chat.completion", "choices": [choice]})


def replies(value: object, status: int = 200, **headers: object) -> Answer:
    """Any JSON."""
    body = json.dumps(value).encode()
    return plain(body, status, Content_Length=len(body), **headers)


def refuses(status: int, message: str = "no", **headers: object) -> Answer:
    """An error, in the form of OpenAI's."""
    return replies({"error": {"message": message}}, status, **headers)


def hangs_up(handler: Handler) -> None:
    """No answer at all."""


def stalls(go_on: threading.Event) -> Answer:
    """No answer before `go_on`."""

    def answer(handler: Handler) -> None:
        go_on.wait(10)

    return answer


def drips(go_on: threading.Event) -> Answer:
    """A body without an end before `go_on`, though something comes all the time."""

    def answer(handler: Handler) -> None:
        head(handler)
        for _ in range(500):
            handler.wfile.write(b" ")
            if go_on.wait(0.02):
                return

    return answer
