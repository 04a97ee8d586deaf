"""Local server that answers like OpenAI's and Ollama's chat completions, or badly."""

import contextlib
import json
from collections.abc import Iterator

from tests.file_server import Answer, Asked, Handler, plain, serving


@contextlib.contextmanager
def judging(*answers: Answer) -> Iterator[tuple[str, list[Asked]]]:
    """Serves the answers in turn, the last one repeatedly; yields the base URL."""
    with serving(*answers) as (url, requests):
        yield url.removesuffix("/file") + "/v1", requests


def replies(value: object, status: int = 200, **headers: object) -> Answer:
    return plain(json.dumps(value).encode(), status, Content_Type="application/json", **headers)


def says(text: str | None) -> Answer:
    message = {"role": "assistant", "content": text}
    return replies({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def refuses(status: int, message: str = "no", **headers: object) -> Answer:
    return replies({"error": {"message": message}}, status, **headers)


def hangs_up(handler: Handler) -> None:
    """Sends no answer."""
