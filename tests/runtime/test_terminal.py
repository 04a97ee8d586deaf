"""Text of a model cannot move the cursor, set the clipboard or reverse the line."""

import io

import pytest

from gptjax.errors import DataError
from gptjax.runtime import terminal
from gptjax.runtime.terminal import sanitize

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
