"""What a model writes cannot move the cursor, set the clipboard or turn the line."""

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.runtime.terminal import sanitize

CONTROLS = {chr(i) for i in [*range(0x20), *range(0x7F, 0xA0)]} - {"\n", "\t"}
TURNING = set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
TURNING |= {"\u061c", "\u200e", "\u200f"}  # marks that turn their neighbours
SURROGATES = set(map(chr, range(0xD800, 0xE000)))
FORBIDDEN = CONTROLS | TURNING | SURROGATES

characters = st.characters() | st.sampled_from(sorted(FORBIDDEN)) | st.just("\n")
texts = st.lists(characters).map("".join)


@pytest.mark.fast
@given(texts, st.lists(st.integers(0, 100)))
def test_nothing_acts_on_a_terminal_however_the_stream_is_cut(text, cuts):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]

    shown = "".join(map(sanitize, pieces))

    assert not FORBIDDEN & set(shown)
    shown.encode()


@given(texts)
def test_only_what_acts_is_replaced_each_by_one_character(text):
    text = text.replace("\r\n", "\n")

    shown = sanitize(text)

    assert [a if a not in FORBIDDEN else "\ufffd" for a in text] == list(shown)
    assert sanitize(shown) == shown


@pytest.mark.parametrize("character", [*sorted(CONTROLS | TURNING), chr(0xD800)])
def test_each_forbidden_character_is_replaced(character):
    assert sanitize(f"a{character}b") == "a\ufffdb"


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\n",
        "Ünïcödé é e\u0301",
        "漢字かな交じり文",
        "می\u200cخواهم",  # a joiner that keeps two letters apart
        "👩\u200d👩\u200d👧 ❤\ufe0f",  # joiners and a variation selector
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # tags
        "soft\u00adhyphen\u00a0blank",
    ],
)
def test_text_of_any_language_stays(text):
    assert sanitize(text) == text


def test_line_ends_of_other_systems_become_one_character_or_a_mark():
    assert sanitize("a\r\nb\rc") == "a\nb\ufffdc"
    assert sanitize("a\r") + sanitize("\nb") == "a\ufffd\nb"


@pytest.mark.parametrize(
    "sequence", ["\x1b]52;c;aGk=\x07", "\x1b[2J", "\x9b2J", "\x1bP+q\x1b\\", "\x08\x08"]
)
def test_sequences_lose_what_starts_them(sequence):
    shown = sanitize(sequence)

    assert "\x1b" not in shown
    assert not any(unicodedata.category(c) == "Cc" for c in shown)
