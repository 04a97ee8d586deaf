"""Local server that answers like OpenAI's and Ollama's chat completions, or badly."""

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

Answer = tuple[int, bytes, dict[str, str]] | None  # status, body, headers; None: hang up


@dataclasses.dataclass(frozen=True)
class Request:
    """Request that the server received."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"]


@contextlib.contextmanager
def judging(*answers: Answer) -> Iterator[tuple[str, list[Request]]]:
    """Serves the answers in turn, the last one repeatedly; yields the base URL."""
    requests: list[Request] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): text for name, text in self.headers.items()}
            requests.append(Request(self.path, headers, body))
            answer = answers[min(len(requests), len(answers)) - 1]
            if answer is None:
                return
            status, reply, reply_headers = answer
            self.send_response(status)
            for name, text in {"Content-Length": str(len(reply)), **reply_headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


def replies(value: object, status: int = 200, **headers: str) -> Answer:
    """Any JSON."""
    return status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers}


def says(text: str | None) -> Answer:
    """Chat completion with this text."""
    message = {"role": "assistant", "content": text}
    return replies({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def refuses(status: int, message: str = "no", **headers: str) -> Answer:
    """Error in OpenAI's format."""
    return replies({"error": {"message": message}}, status, **headers)
