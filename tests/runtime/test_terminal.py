"""Text of a model cannot move the cursor, set the clipboard or reverse the line."""

from gptjax.runtime.terminal import sanitize

CONTROLS = {chr(i) for i in [*range(0x20), *range(0x7F, 0xA0)]} - {"\n", "\t"}
BIDIRECTIONAL = {*map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x2070)])}
FORBIDDEN = CONTROLS | BIDIRECTIONAL | {*"\u061c\u200e\u200f", *map(chr, range(0xD800, 0xE000))}


def test_exactly_the_control_characters_are_replaced():
    for character in map(chr, range(0x11000)):
        assert (sanitize(character) == "\ufffd") == (character in FORBIDDEN | {"\ufffd"})
    for text in (
        "a\tb\n",
        "Ünïcödé é e\u0301 漢字かな交じり文",
        "می\u200cخواهم",  # a joiner that keeps two letters apart
        "👩\u200d👩\u200d👧 ❤\ufe0f",  # joiners and a variation selector
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # tags
    ):
        assert sanitize(text) == text
    assert sanitize("a\r\nb\rc\x1b[2J") == "a\nb\ufffdc\ufffd[2J"
