"""Text of a model cannot move the cursor, set the clipboard or reverse the line."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.runtime.terminal import sanitize

CONTROLS = {chr(i) for i in [*range(0x20), *range(0x7F, 0xA0)]} - {"\n", "\t"}
BIDIRECTIONAL = {*map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)])}
BIDIRECTIONAL |= {"\u061c", "\u200e", "\u200f"}
FORBIDDEN = CONTROLS | BIDIRECTIONAL | {*map(chr, range(0xD800, 0xE000))}

characters = st.characters() | st.sampled_from(sorted(FORBIDDEN)) | st.just("\n")


@pytest.mark.fast
@given(st.lists(characters).map("".join), st.lists(st.integers(0, 100)))
def test_exactly_the_control_characters_are_replaced_wherever_a_stream_is_split(text, cuts):
    text = text.replace("\r\n", "\n")
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]

    shown = "".join(sanitize(text[a:b]) for a, b in itertools.pairwise(places))

    assert shown == "".join("\ufffd" if a in FORBIDDEN else a for a in text)


def test_every_control_character_is_replaced_and_text_of_any_language_is_kept():
    assert sanitize("".join(FORBIDDEN)) == "\ufffd" * len(FORBIDDEN)
    for text in (
        "a\tb\n",
        "Ünïcödé é e\u0301 漢字かな交じり文",
        "می\u200cخواهم",  # a joiner that keeps two letters apart
        "👩\u200d👩\u200d👧 ❤\ufe0f",  # joiners and a variation selector
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # tags
        "soft\u00adhyphen\u00a0blank",
    ):
        assert sanitize(text) == text
    assert sanitize("a\r\nb\rc") == "a\nb\ufffdc"
