"""Text of a model cannot move the cursor, set the clipboard or reverse the line.

What cannot be printed is an error only where it is what the command is for.
"""

import io
import os

import pytest

from gptjax.errors import DataError, ResourceError
from gptjax.runtime import terminal
from gptjax.runtime.terminal import (
    is_terminal,
    print_message,
    print_progress,
    print_result,
    read_stdin,
    sanitize,
)

CONTROLS = {chr(i) for i in [*range(0x20), *range(0x7F, 0xA0)]} - {"\n", "\t"}
BIDIRECTIONAL = {*map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x2070)])}
FORBIDDEN = CONTROLS | BIDIRECTIONAL | {*"\u061c\u200e\u200f", *map(chr, range(0xD800, 0xE000))}


def test_exactly_the_control_characters_are_replaced():
    for character in map(chr, [*range(0x11000), *range(0xE0000, 0xE0080)]):  # emoji have tags
        assert (sanitize(character) == "\ufffd") == (character in FORBIDDEN | {"\ufffd"})
    assert sanitize("a\r\nb\rc\x1b[2J") == "a\nb\ufffdc\ufffd[2J"


def test_stdin_is_read_without_a_byte_order_mark_and_is_not_endless(monkeypatch):
    monkeypatch.setattr(terminal, "MAX_STDIN_CHARS", 9)
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa\n\ufeffb"))
    assert terminal.read_stdin() == "a\n\ufeffb"

    for endless in ("0" * 99, "0\n" * 99):
        monkeypatch.setattr("sys.stdin", io.StringIO(endless))
        with pytest.raises(DataError, match="9 characters"):
            terminal.read_stdin()


def closed_pipe():
    read_end, write_end = os.pipe()
    os.close(read_end)
    return os.fdopen(write_end, "w")


@pytest.mark.parametrize(
    ("open_stream", "error"),
    [
        (lambda: None, ResourceError),  # it was closed when Python started
        (lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"), ResourceError),
        (closed_pipe, BrokenPipeError),
    ],
)
def test_only_results_have_to_be_printed(monkeypatch, open_stream, error):
    for name, function in (("stdout", print_progress), ("stderr", print_message)):
        monkeypatch.setattr(f"sys.{name}", stream := open_stream())
        function("text")
        function("text")
        _ = stream and stream.close()  # discards what is left
    monkeypatch.setattr("sys.stdout", stream := open_stream())
    with pytest.raises(error):
        print_result("text")
    assert not is_terminal(stream)
    _ = stream and stream.close()


def test_a_stream_prints_what_it_can_encode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stream)

    print_result("é\x1b[31m")

    assert stream.buffer.getvalue() == b"??[31m\n"


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8")])
def test_stdin_that_cannot_be_read_is_an_error(monkeypatch, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(DataError, match="stdin"):
        read_stdin()
