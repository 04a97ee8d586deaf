"""Sandboxed rendering of untrusted chat templates.

A template is a program: it can loop forever or expand to gigabytes. Templates that do
not ship with gptjax run in a subprocess with a minimal environment and limits on CPU
time and memory. All templates run in Jinja's immutable sandbox.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from gptjax.errors import ConfigError

TEMPLATE_DIR = Path(__file__).parent / "templates"
BUILTIN_TEMPLATES = ("alpaca", "phi3", "chatml", "qa", "single")
EOT_TEXT = "<|endoftext|>"

MAX_CPU_SECONDS = 5  # CPU time per conversation
WORKER_TIMEOUT_SECONDS = 300  # wall time per conversation, on a busy machine
MAX_WORKER_MEMORY_BYTES = 1 << 30  # address space of the worker
MAX_RENDERED_BYTES = 1 << 26  # size of a reply of the worker
WORKER_ENV_VARS = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "LANG")
WORKER_LOCK = threading.Lock()  # one request at a time

# Unicode noncharacters, which are not meant to occur in text.
TEXT_MARK, REPLY_MARK, CLOSE_MARK, EOT_MARK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARK_REPLACEMENTS = str.maketrans(
    dict.fromkeys((TEXT_MARK, REPLY_MARK, CLOSE_MARK, EOT_MARK), "\ufffd")
)

# "role", "content" and, from a user, optionally "input".
ChatMessage = Mapping[str, str]


def render_template(
    source: str, messages: Sequence[ChatMessage], add_generation_prompt: bool = False
) -> str:
    """Renders a conversation, with marks around the texts of messages.

    Raises:
        ConfigError: the template fails or exceeds the limits.
    """
    if source in trusted_sources():
        return render_in_process(source, messages, add_generation_prompt)
    message_dicts = [dict(message) for message in messages]
    request = json.dumps([source, message_dicts, add_generation_prompt, MAX_CPU_SECONDS])
    with WORKER_LOCK:
        reply = send_request(render_worker(os.getpid()), f"{request}\n".encode())
        if not reply.endswith(b"\n"):
            stop_worker(render_worker(os.getpid()))
            render_worker.cache_clear()
            raise ConfigError(
                f"the chat template needs more than {MAX_CPU_SECONDS} seconds or "
                f"{MAX_WORKER_MEMORY_BYTES >> 20} MB for one conversation. Correct it, "
                f"or use one of {', '.join(BUILTIN_TEMPLATES)}."
            )
    text, error = json.loads(reply)
    if error:
        raise ConfigError(error)
    return text


@functools.cache
def trusted_sources() -> frozenset[str]:
    """Sources of the built-in templates, which are rendered in this process."""
    files = [TEMPLATE_DIR / f"{name}.jinja" for name in BUILTIN_TEMPLATES]
    return frozenset(file.read_bytes().decode() for file in files)


@functools.cache
def render_worker(_pid: int) -> Any:
    """Starts the worker process; cached per process id, as forks need their own."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    env = {name: os.environ[name] for name in WORKER_ENV_VARS if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gptjax.tokenizer.template_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env | {"PYTHONPATH": paths},
    )
    atexit.register(stop_worker, process)
    return process


def send_request(process: Any, request: bytes) -> bytes:
    """Sends a request; returns the reply line, incomplete if the worker ended."""
    timer = threading.Timer(WORKER_TIMEOUT_SECONDS, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline(MAX_RENDERED_BYTES)
    except OSError:  # the worker ended
        return b""
    finally:
        timer.cancel()


def stop_worker(process: Any) -> None:
    """Kills the worker and closes its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # unflushed data
            pipe.close()


def worker_main() -> None:
    """Worker: replies to each JSON line on stdin with [text, error]."""
    set_rlimit("RLIMIT_AS", MAX_WORKER_MEMORY_BYTES)
    set_rlimit("RLIMIT_CORE", 0)
    for line in sys.stdin.buffer:
        source, messages, add_generation_prompt, seconds = json.loads(line)
        cpu_times = os.times()
        set_rlimit("RLIMIT_CPU", int(cpu_times.user + cpu_times.system) + 1 + seconds)
        try:
            reply = [render_in_process(source, messages, add_generation_prompt), ""]
        except ConfigError as error:
            reply = ["", str(error)]
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def set_rlimit(name: str, soft_limit: int) -> None:
    """Sets a soft resource limit of this process, where supported."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        kind = getattr(resource, name)
        _, hard_limit = resource.getrlimit(kind)
        resource.setrlimit(kind, (soft_limit, hard_limit))


def render_in_process(
    source: str, messages: Sequence[ChatMessage], add_generation_prompt: bool
) -> str:
    """Renders in this process, without limits."""
    marked_messages = [
        {
            name: value if name == "role" else MarkedText.wrap(value, message["role"])
            for name, value in message.items()
        }
        for message in messages
    ]
    try:
        return compile_jinja(source).render(
            messages=marked_messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=EOT_MARK,
            eos_token=EOT_MARK,
            raise_exception=raise_exception,
        )
    except Exception as error:  # a template can raise anything
        raise ConfigError(
            f"the chat template failed: {type(error).__name__}: {error!s:.500}. "
            f"Correct it, or use one of {', '.join(BUILTIN_TEMPLATES)}."
        ) from error


def raise_exception(message: str) -> None:
    """Implements `raise_exception` for templates."""
    raise jinja2.TemplateError(str(message))


class MarkedText(str):
    """Message text between two marks that stripping preserves."""

    @classmethod
    def wrap(cls, text: str, role: str) -> "MarkedText":
        """Marks the text of a message of this role."""
        mark = REPLY_MARK if role == "assistant" else TEXT_MARK
        return cls(mark + text.translate(MARK_REPLACEMENTS) + CLOSE_MARK)

    def __bool__(self) -> bool:
        return len(self) > 2

    def strip(self, chars: str | None = None, /) -> "MarkedText":
        """Strips inside the marks."""
        return MarkedText(self[0] + self[1:-1].strip(chars) + self[-1])

    def lstrip(self, chars: str | None = None, /) -> "MarkedText":
        """Strips on the left, inside the marks."""
        return MarkedText(self[0] + self[1:-1].lstrip(chars) + self[-1])

    def rstrip(self, chars: str | None = None, /) -> "MarkedText":
        """Strips on the right, inside the marks."""
        return MarkedText(self[0] + self[1:-1].rstrip(chars) + self[-1])


class GenerationTag(jinja2.ext.Extension):
    """Ignores the tag {% generation %}, which newer templates put around replies."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        """Returns the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without operators that can create huge strings or integers."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Allows * and % between integers only, and no **."""
        if operator == "**" or not (type(left) is type(right) is int):
            raise jinja2.sandbox.SecurityError(f"{left!r:.20} {operator} {right!r:.20}")
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=16)
def compile_jinja(source: str) -> jinja2.Template:
    """Compiles a template; <|endoftext|> in its source is the end token."""
    sandbox = TemplateSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    return sandbox.from_string(source.translate(MARK_REPLACEMENTS).replace(EOT_TEXT, EOT_MARK))


if __name__ == "__main__":
    worker_main()
