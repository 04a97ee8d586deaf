"""The console: all text that a command prints, made safe for a terminal.

Nothing else in the package prints. Text of models, files, servers and users may contain
sequences that control a terminal. A stream may be closed, full or unable to encode it.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from gptjax.errors import DataError, ResourceError

MAX_STDIN_CHARS = 1 << 26  # of a line, and of a text
logger = logging.getLogger("gptjax")  # of progress and warnings; a command prints them

# Control characters except tab and newline, surrogates, and bidirectional controls.
# Joiners, variation selectors and tags stay: emoji and Persian need them.
CONTROL_CHARS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]"
)
SECRET_VARIABLES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
MIN_SECRET_CHARS = 8  # a shorter value, such as "ollama", stands in for a key


def sanitize(text: str) -> str:
    r"""Replaces characters that control a terminal by U+FFFD.

    Chunks of a stream may be split anywhere.

    >>> sanitize("a\r\nb\x1b[2J")
    'a\nb�[2J'
    """
    return CONTROL_CHARS.sub("\ufffd", text.replace("\r\n", "\n"))


def redact_secrets(text: str, *secrets: str) -> str:
    """Replaces keys of the user, which a server may have sent back, by "…"."""
    for secret in map(str.strip, (*secrets, *(os.environ.get(n, "") for n in SECRET_VARIABLES))):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "…")
    return text


def print_result(text: object, end: str = "\n", *, is_safe: bool = False) -> None:
    """Prints the result of a command to stdout, sanitized unless `is_safe`.

    Raises BrokenPipeError if the reader of a pipe has closed it, else ResourceError.
    """
    try:
        _write(sys.stdout, f"{text}{end}", is_safe)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # a closed stream is a ValueError
        raise ResourceError(
            f"cannot write to stdout: {error}. Direct it to a file or a terminal."
        ) from error


def print_progress(text: object) -> None:
    """Prints a line of progress to stdout; ignores a stream that is closed or full."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stdout, f"{text}\n")


def print_message(text: object) -> None:
    """Prints a line to stderr; ignores a stream that is closed or full."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, f"{text}\n")


def _write(stream: Any, text: str, is_safe: bool = False) -> None:
    if stream is None:  # it was closed when the process started
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    encoding = stream.encoding or "utf-8"
    text = text if is_safe else sanitize(redact_secrets(text))
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):
        discard(stream)
        raise


def is_terminal(stream: Any) -> bool:
    """True if a standard stream is a terminal; False if it is closed."""
    return stream is not None and not stream.closed and stream.isatty()


def discard(stream: Any) -> None:
    """Redirects a failing stream to /dev/null, or Python would fail to flush it."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


def open_closed_streams() -> None:
    """Opens standard streams that are closed, so that no file gets their numbers.

    `sys.stdin` and `sys.stdout` remain None.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:  # libraries write to it
        sys.stderr = os.fdopen(2, "w", closefd=False)


def stdin_lines() -> Iterator[str]:
    r"""Yields the lines of stdin as they arrive; all end with \n.

    A byte-order mark is removed.
    """
    stdin: Any = sys.stdin
    try:
        if stdin is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        with contextlib.suppress(AttributeError, OSError):  # no file, or already read from
            stdin.reconfigure(newline="\n")  # else \r ends a line as well
        lines = iter(functools.partial(stdin.readline, MAX_STDIN_CHARS), "")
        for number, line in enumerate(lines):
            if len(line) == MAX_STDIN_CHARS:
                raise ValueError(f"a line has more than {MAX_STDIN_CHARS:,} characters")
            line = f"{line[:-2]}\n" if line.endswith("\r\n") else line
            yield line if number else line.removeprefix("\ufeff")
    except (OSError, ValueError) as error:  # closed, a folder, endless, or not UTF-8
        raise DataError(f"cannot read stdin: {error}. Give it UTF-8 text.") from error


def read_stdin() -> str:
    """Reads all of stdin, which must not be endless."""
    text = io.StringIO()
    for line in stdin_lines():
        text.write(line)
        if text.tell() > MAX_STDIN_CHARS:
            raise DataError(f"stdin has more than {MAX_STDIN_CHARS:,} characters. Shorten it.")
    return text.getvalue()
