"""Jinja of strangers, run where it can do no harm.

A template is a program: it can loop for ever, or make gigabytes out of little. So one
that does not ship with gptjax runs in a process of its own, which has no secrets in its
environment and is ended when it takes too long or too much memory; in Jinja's immutable
sandbox everywhere.
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

FOLDER = Path(__file__).parent / "templates"
BUILT_IN = ("alpaca", "phi3", "chatml", "qa", "single")
ENDOFTEXT = "<|endoftext|>"

SECONDS = 5  # of a processor, for one conversation
PATIENCE = 300  # seconds by the clock, which a busy machine may need for these
MEMORY = 1 << 30  # bytes of address space of the process
MOST_BYTES = 1 << 26  # of what it prints
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "LANG")
LOCK = threading.Lock()  # one question to the process at a time

# Noncharacters, which Unicode keeps out of texts that are passed on.
TEXT, ANSWER, CLOSE, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = str.maketrans(dict.fromkeys((TEXT, ANSWER, CLOSE, END), "\ufffd"))

Message = Mapping[str, str]  # "role", "content", and a user's may have an "input"


def render(source: str, messages: Sequence[Message], answering: bool = False) -> str:
    """What the template prints, with marks around the texts of messages.

    Raises:
        ConfigError: it does not work, or takes more than it may.
    """
    if source in own_sources():
        return render_here(source, messages, answering)
    plain = [dict(message) for message in messages]
    request = json.dumps([source, plain, answering, SECONDS]).encode() + b"\n"
    with LOCK:
        reply = ask(worker(os.getpid()), request)
        if not reply.endswith(b"\n"):
            end(worker(os.getpid()))
            worker.cache_clear()
            raise ConfigError(
                f"the chat template takes more than {SECONDS} seconds, or more than "
                f"{MEMORY >> 20} MB, for one conversation. Correct it, or use one of "
                f"{', '.join(BUILT_IN)}."
            )
    text, why = json.loads(reply)
    if why:
        raise ConfigError(why)
    return text


@functools.cache
def own_sources() -> frozenset[str]:
    """The templates that ship with gptjax, which are known to be harmless."""
    files = [FOLDER / f"{name}.jinja" for name in BUILT_IN]
    return frozenset(file.read_bytes().decode() for file in files)


@functools.cache
def worker(_pid: int) -> Any:
    """The process that renders for the process of this number."""
    code = (
        "import sys; sys.path[:] = sys.argv[1:]; "
        "from gptjax import rendering; rendering.serve()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    atexit.register(end, process)
    return process


def ask(process: Any, request: bytes) -> bytes:
    """The line that the process answers; not a whole one if it has ended."""
    timer = threading.Timer(PATIENCE, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline(MOST_BYTES)
    except OSError:  # it ends while it is asked
        return b""
    finally:
        timer.cancel()


def end(process: Any) -> None:
    """Ends the process, if it has not ended yet."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # of what it was not able to read
            pipe.close()


def serve() -> None:
    """Answers each line on stdin with a line: the text, or why there is none."""
    limit("RLIMIT_AS", MEMORY)
    limit("RLIMIT_CORE", 0)
    for line in sys.stdin.buffer:
        source, messages, answering, seconds = json.loads(line)
        used = os.times()
        limit("RLIMIT_CPU", int(used.user + used.system) + 1 + seconds)
        try:
            reply = [render_here(source, messages, answering), ""]
        except ConfigError as error:
            reply = ["", str(error)]
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def limit(name: str, most: int) -> None:
    """Limits this process, where the system can; the limit may be raised again."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most, hard))


def render_here(source: str, messages: Sequence[Message], answering: bool) -> str:
    """`render` in this process, whatever it takes."""
    marked = [
        {
            name: value if name == "role" else Marked.of(value, message["role"])
            for name, value in message.items()
        }
        for message in messages
    ]
    try:
        return program(source).render(
            messages=marked,
            add_generation_prompt=answering,
            bos_token=END,
            eos_token=END,
            raise_exception=complain,
        )
    except Exception as error:  # it can fail in every way that a program can
        raise ConfigError(
            f"the chat template does not work: {type(error).__name__}: {error!s:.500}. "
            f"Correct it, or use one of {', '.join(BUILT_IN)}."
        ) from error


def complain(why: str) -> None:
    """The templates' own `raise_exception`."""
    raise jinja2.TemplateError(str(why))


class Marked(str):
    """A message's text between two marks that trimming leaves in place."""

    @classmethod
    def of(cls, text: str, role: str) -> "Marked":
        """The marked text of a message of that role."""
        mark = ANSWER if role == "assistant" else TEXT
        return cls(mark + text.translate(MARKS) + CLOSE)

    def __bool__(self) -> bool:
        return len(self) > 2

    def strip(self, chars: str | None = None, /) -> "Marked":
        """As `str.strip`, inside the marks."""
        return Marked(self[0] + self[1:-1].strip(chars) + self[-1])

    def lstrip(self, chars: str | None = None, /) -> "Marked":
        """As `str.lstrip`, inside the marks."""
        return Marked(self[0] + self[1:-1].lstrip(chars) + self[-1])

    def rstrip(self, chars: str | None = None, /) -> "Marked":
        """As `str.rstrip`, inside the marks."""
        return Marked(self[0] + self[1:-1].rstrip(chars) + self[-1])


class Generation(jinja2.ext.Extension):
    """Lets {% generation %} pass, which newer templates put around answers."""

    tags = {"generation"}  # noqa: RUF012 (what Jinja wants)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the operators that make much out of little."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result for small integers; anything else is refused."""
        if operator == "**" or not (type(left) is type(right) is int):
            raise jinja2.sandbox.SecurityError(f"{left!r:.20} {operator} {right!r:.20}")
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=16)
def program(source: str) -> jinja2.Template:
    """The template as Jinja runs it; <|endoftext|> in it is the end token."""
    sandbox = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    return sandbox.from_string(source.translate(MARKS).replace(ENDOFTEXT, END))
