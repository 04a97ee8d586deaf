"""The page of `gptjax watch --browser`: the view of a run, for this machine only.

The page loads nothing from elsewhere, and its content security policy forbids it. All
texts are escaped. Requests for another host name are rejected: a foreign page could
otherwise read this one by giving its own name the address 127.0.0.1 (DNS rebinding).
"""

import html
import io
import secrets
import string
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptjax.cli.watch import REFRESH_SECONDS, format_progress, format_state, format_values
from gptjax.errors import GptjaxError, ResourceError
from gptjax.plots.curves import loss_figure
from gptjax.runtime.terminal import print_message, redact_secrets, sanitize
from gptjax.training.metrics import LOSS_UNITS
from gptjax.training.run_status import RunStatus, read_run_status

ADDRESS = "127.0.0.1"
HOST_NAMES = (ADDRESS, "localhost")  # with any port: ssh may forward another one
REQUEST_TIMEOUT_SECONDS = 10.0
PAGE_TEMPLATE = string.Template(
    Path(__file__).with_name("watch_page.html").read_text(encoding="utf-8")
)
CONTENT_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def serve_run(run_dir: Path, port: int) -> None:
    """Serves the page of a run until the command is interrupted."""
    read_run_status(run_dir)  # a folder without a run is an error
    try:
        server = PageServer(run_dir, port)
    except OSError as error:
        raise ResourceError(
            f"--port {port} of {ADDRESS} cannot be used: {error.strerror}. Choose another one, "
            "or 0 for any that is free."
        ) from error
    with server:
        print_message(f"http://{ADDRESS}:{server.server_port}/  (Ctrl-C ends it)")
        server.serve_forever(poll_interval=0.2)


class PageServer(ThreadingHTTPServer):
    """Server of the page of one run; all open pages share one reading per refresh."""

    def __init__(self, run_dir: Path, port: int) -> None:
        super().__init__((ADDRESS, port), PageHandler)
        self.run_dir, self.lock = run_dir, threading.Lock()
        self.nonce = secrets.token_urlsafe()  # one: a page parses later versions of itself
        self.view, self.read_at = "", -REFRESH_SECONDS
        self.picture, self.num_drawn = b"", -1  # loss curve and its number of events

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a connection that the browser has closed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def read(self) -> tuple[str, bytes]:
        """View of the run as HTML, and its loss curve as SVG."""
        with self.lock:
            if time.monotonic() - self.read_at > REFRESH_SECONDS / 2:
                self.read_run()
                self.read_at = time.monotonic()
            return self.view, self.picture

    def read_run(self) -> None:
        """Reads the run; draws its loss curve if there are new events."""
        try:
            status = read_run_status(self.run_dir)
        except GptjaxError as error:  # such as a folder that was removed
            self.view = f'<p id="state">{escape(str(error))}</p>'
            return
        if len(status.events) != self.num_drawn:
            self.picture, self.num_drawn = draw_loss(status), len(status.events)
        self.view = format_status(status, f"/loss.svg?{self.num_drawn}")


def draw_loss(status: RunStatus) -> bytes:
    """Draws the loss curve of a run as SVG."""
    units_per_step, unit, picture = status.tokens_per_step or 1, "token", io.BytesIO()
    if status.config and status.config.train.task in LOSS_UNITS:
        unit = LOSS_UNITS[status.config.train.task]
        units_per_step = status.config.data.batch_size
    loss_figure(status.events, units_per_step, unit).savefig(picture, format="svg")
    return picture.getvalue()


def format_status(status: RunStatus, picture_url: str) -> str:
    """Formats the view of a run as HTML."""
    now, sample = time.time(), status.last("sample")
    state, _, rest = format_state(status, now).partition(" ")
    fraction = status.step / status.config.train.steps if status.config else 0.0
    values = "".join(f"<li>{escape(value)}</li>" for value in format_values(status))
    title = f"Sample after step {sample['step']:,}:" if sample else ""
    text = f"<pre>{escape(str(sample.get('text', '')))}</pre>" if sample else ""
    return "\n".join(
        [
            f'<h1 id="name">{escape(str(status.run_dir))}</h1>',
            f'<p id="state"><span class="state {status.state}">{escape(state)}</span> '
            f"{escape(rest)}</p>",
            f'<progress id="progress" value="{min(fraction, 1.0):.4f}"></progress>',
            f'<p id="steps">{escape(format_progress(status, now))}</p>',
            f'<ul id="values">{values}</ul>',
            f'<img id="loss" src="{picture_url}" alt="training and validation loss">',
            f'<div id="sample">{title}{text}</div>',
        ]
    )


def escape(text: str) -> str:
    """Escapes text for HTML; control characters and secrets are removed first."""
    return html.escape(sanitize(redact_secrets(text)))


def is_local(host: str) -> bool:
    """True if a Host header names this machine."""
    try:
        return urlsplit(f"//{host}").hostname in HOST_NAMES
    except ValueError:
        return False


class PageHandler(BaseHTTPRequestHandler):
    """Answers requests for the page and for its picture."""

    server: Any  # a PageServer
    timeout = REQUEST_TIMEOUT_SECONDS  # of a connection without a request
    server_version, sys_version = "gptjax", ""

    def do_GET(self) -> None:
        """Answers a request for / or /loss.svg."""
        nonce = self.server.nonce
        if not is_local(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif self.path == "/":
            names = {"title": escape(self.server.run_dir.name), "nonce": nonce}
            milliseconds = round(1000 * REFRESH_SECONDS)
            page = PAGE_TEMPLATE.substitute(
                names, view=self.server.read()[0], milliseconds=milliseconds
            )
            self.send(page.encode(errors="replace"), "text/html; charset=utf-8", nonce)
        elif self.path.startswith("/loss.svg"):
            self.send(self.server.read()[1], "image/svg+xml", nonce)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def send(self, body: bytes, content_type: str, nonce: str) -> None:
        """Sends a document that may load nothing from other servers."""
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": CONTENT_POLICY.format(nonce=nonce),
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        self.send_response(HTTPStatus.OK)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing for a request."""
