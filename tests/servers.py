"""Local HTTP servers, good or bad: of files, of a Hugging Face hub, of an LLM judge."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from gptjax.fileio.download import Pin

BODY = bytes(range(256)) * 800
HASH = hashlib.sha256(BODY).hexdigest()
PIN = Pin(len(BODY), HASH)
COMMIT = "1" * 40  # of the repository on the local hub
Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler], None]


class Asked(NamedTuple):
    """One request that the server received."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[tuple[str, list[Asked]]]:
    """A server that gives these answers in turn, then the last one repeatedly."""
    asked: list[Asked] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): text for name, text in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            asked.append(Asked(self.path, headers, body))
            self.body = body
            with contextlib.suppress(ConnectionError):
                answers[min(len(asked), len(answers)) - 1](self)

        do_HEAD = do_POST = do_PUT = do_GET

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
    """Sends the whole body."""

    def answer(handler: Handler) -> None:
        head(handler, status, **headers)
        handler.wfile.write(body)

    return answer


def file(body: bytes, cut: int | None = None, **headers: object) -> Answer:
    """Serves a file and ranges of it; closes the connection after `cut` bytes."""

    def answer(handler: Handler) -> None:
        start, size, extra = 0, len(body), dict(headers)
        if asked := re.fullmatch(r"bytes=(\d+)-\d*", handler.headers.get("Range", "")):
            start = int(asked[1])
            extra["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
        head(handler, 206 if start else 200, Content_Length=size - start, **extra)
        if handler.command == "GET":
            handler.wfile.write(body[start:][:cut])

    return answer


def endless(handler: Handler) -> None:
    """Sends a body without end."""
    head(handler)
    while True:
        handler.wfile.write(BODY)


def hangs_up(handler: Handler) -> None:
    """Sends no answer."""


def hub_headers(name: str, body: bytes) -> dict[str, object]:
    """The headers of a file on the hub; large files are known by their sha256."""
    digest = hashlib.new("sha256" if name.endswith(".safetensors") else "sha1", body)
    return {"ETag": f'"{digest.hexdigest()}"', "X_Repo_Commit": COMMIT}


def hub(files: Mapping[str, bytes | Answer]) -> Answer:
    """A hub whose repositories all have these files, or answers in place of files."""
    missing = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": COMMIT}

    def answer(handler: Handler) -> None:
        name = handler.path.rpartition("/")[2]
        found = files.get(name, lambda handler: head(handler, 404, **missing))
        (file(found, **hub_headers(name, found)) if isinstance(found, bytes) else found)(handler)

    return answer


def writable_hub(stored: dict[str, bytes]) -> Answer:
    """A hub that accepts commits: their files, by path. Weights are LFS objects."""
    objects: dict[str, bytes] = {}

    def reply(handler: Handler, value: object) -> None:
        plain(json.dumps(value).encode(), Content_Type="application/json")(handler)

    def answer(handler: Handler) -> None:
        url, body = f"http://{handler.headers['Host']}", handler.body
        match handler.path.partition("?")[0].strip("/").split("/"):
            case ["api", "repos", "create"]:
                name = "/".join(filter(None, map(json.loads(body).get, ("organization", "name"))))
                reply(handler, {"url": f"{url}/{name}", "name": name})
            case ["api", "validate-yaml"]:
                reply(handler, {"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", "main"]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
                files = [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False}
                    for path, mode in zip(paths, modes, strict=True)
                ]
                reply(handler, {"files": files})
            case [_, _, "info", "lfs", "objects", "batch"]:
                wanted = json.loads(body)["objects"]
                actions = [{"upload": {"href": f"{url}/lfs/{x['oid']}"}} for x in wanted]
                found = [x | {"actions": a} for x, a in zip(wanted, actions, strict=True)]
                reply(handler, {"transfer": "basic", "objects": found})
            case ["lfs", oid]:
                objects[oid] = body
                head(handler, 200, Content_Length=0)
            case ["api", "models", owner, name, "commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        stored[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        stored[value["path"]] = objects[value["oid"]]
                address = f"{url}/{owner}/{name}/commit/{COMMIT}"
                reply(handler, {"commitUrl": address, "commitOid": COMMIT})
            case _:
                head(handler, 404, Content_Length=0)

    return answer


def use_hub(monkeypatch, folder, url: str) -> None:
    """Sets the hub's address and cache for this process, and clears other settings."""
    from huggingface_hub import constants

    for name in ("GPTJAX_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = url.removesuffix("/file")
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder),
        "HF_TOKEN_PATH": str(folder / "token"),
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), False),
    }.items():
        monkeypatch.setattr(constants, name, value)


@contextlib.contextmanager
def judging(*answers: Answer) -> Iterator[tuple[str, list[Asked]]]:
    """Serves the answers of a judge as `serving` does; yields its base URL."""
    with serving(*answers) as (url, requests):
        yield url.removesuffix("/file") + "/v1", requests


def replies(value: object, status: int = 200, **headers: object) -> Answer:
    return plain(json.dumps(value).encode(), status, Content_Type="application/json", **headers)


def says(text: str | None) -> Answer:
    message = {"role": "assistant", "content": text}
    return replies({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def refuses(status: int, message: str = "no", **headers: object) -> Answer:
    return replies({"error": {"message": message}}, status, **headers)
