"""Every text can be drawn as boxes, and none of it is lost."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.font_manager import findfont, get_font

from gptjax.plots import token_boxes
from gptjax.plots.figures import PALE_BLUE, PALE_ORANGE, tokenization_figure
from gptjax.plots.token_boxes import (
    CELLS_PER_LINE,
    FONT_FAMILIES,
    MAX_LINES,
    MAX_TOKEN_LABEL_CHARS,
    NEWLINE_MARK,
    Box,
    layout_boxes,
    to_drawable,
    token_box_figure,
    token_label,
    width_in_cells,
)
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.tokenizer import load_tokenizer
from tests.pictures import assert_boxes_hold_their_texts, assert_nothing_is_cut_off, faces, written

HARD = "$x$ é漢👩\u200d👧😀\tnaïve\r\n\n\x1b[2J\u202e _{^\\frac $ <|endoftext|>"
characters = st.sampled_from("ab é漢👧😀 \n\t$\r\x1b") | st.characters(codec="utf-8")
words = st.text(characters, min_size=1, max_size=90)
notes = st.sampled_from(["", "1", "50256", "1 2 3", "12345 " * 30])


@given(st.lists(st.tuples(words, notes), min_size=1, max_size=40))
@example([("x" * 200, "")])
@example([("😀" * 90, "")])
@example([("\n" * 200, ""), ("a", "50256")])
def test_boxes_follow_each_other_without_a_loss_within_the_lines(pairs):
    spots = list(layout_boxes(Box(text, "white", note=note) for text, note in pairs))

    for number, (text, note) in enumerate(pairs):
        parts = [spot for spot in spots if spot.box_index == number]
        assert "".join(spot.text for spot in parts) == to_drawable(text)
        assert parts[0].note[:39] == note[:39]
        assert not any(spot.note for spot in parts[1:])
    for spot in spots:
        assert 0 <= spot.column <= spot.column + spot.width <= CELLS_PER_LINE
        assert spot.width >= max(width_in_cells(spot.text), 1)
        assert NEWLINE_MARK not in spot.text.rstrip(NEWLINE_MARK)
    for one, after in itertools.pairwise(spots):
        if one.text.endswith(NEWLINE_MARK):
            assert (after.line, after.column) == (one.line + 1, 0)
        elif after.line == one.line:
            assert after.column == one.column + one.width
        else:
            assert (after.line, after.column) == (one.line + 1, 0)
            assert one.column + one.width + after.width > CELLS_PER_LINE


@given(st.text(characters))
def test_only_what_the_fonts_have_is_drawn(text):
    shown = to_drawable(text)

    assert len(shown) == len(sanitize(text))
    for character in shown:
        assert any(
            get_font(findfont(family)).get_char_index(ord(character)) for family in FONT_FAMILIES
        )
    assert "\n" not in shown


@settings(max_examples=10)
@given(st.lists(words, min_size=1, max_size=9))
@example([HARD])
@example(list(HARD))
@example(["W" * CELLS_PER_LINE, "g" * (CELLS_PER_LINE + 1), "😀" * 20])
def test_no_text_is_cut_off_or_covers_another(texts):
    pieces = [Box(text, "white", note=str(n) * 5) for n, text in enumerate(texts)]

    figure = token_box_figure(pieces, "a title of many words " * 5, [Box("legend", "red")])

    assert_boxes_hold_their_texts(figure)
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("text", ["x", "\n"])
def test_what_is_too_long_is_counted_in_a_last_box(text):
    most = (MAX_LINES - 1) * (CELLS_PER_LINE if text == "x" else 1)
    full = MAX_LINES * CELLS_PER_LINE

    figure = token_box_figure([Box(text, "white")] * (full + 1), "title")

    assert written(figure)[-1] == f"… {full + 1 - most:,} more boxes"
    assert len(figure.axes[0].patches) == most + 1
    assert figure.get_figheight() < 10
    assert_nothing_is_cut_off(figure)


def test_what_just_fits_is_drawn_whole():
    figure = token_box_figure([Box("x", "white")] * (MAX_LINES * CELLS_PER_LINE), "title")

    assert written(figure) == ["title", *"x" * (MAX_LINES * CELLS_PER_LINE)]


def test_blanks_before_a_text_are_room_in_its_box():
    figure = token_box_figure([Box("  ab", "white"), Box("   ", "white")], "title")

    _, text = figure.axes[0].texts
    assert text.get_text() == "ab"
    assert text.get_position()[0] == token_boxes.FIGURE_MARGIN + 2 * token_boxes.CELL_WIDTH
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == [4 * token_boxes.CELL_WIDTH, 3 * token_boxes.CELL_WIDTH]


def test_a_text_in_dollars_is_no_formula():
    figure = token_box_figure([Box("$x_1$", "white", note="$y$")], "title")

    assert written(figure) == ["title", "$x_1$", "$y$"]
    assert not any(text.get_parse_math() for text in figure.axes[0].texts[1:])


def test_tokens_stay_together_until_their_text_is_whole():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("a漢😀")

    found = list(tokenizer.iter_characters(ids))

    assert [text for text, _ in found] == ["a", "漢", "😀"]
    assert [len(part) for _, part in found] == [1, 3, 4]
    assert [i for _, part in found for i in part] == ids


@given(st.binary(max_size=20))
def test_every_token_has_a_label_of_one_short_line(piece):
    label = token_label(piece)

    assert len(label) <= MAX_TOKEN_LABEL_CHARS
    assert not {" ", "\n", "\t"} & set(label)
    assert to_drawable(label) == label


def test_letters_are_white_where_that_is_easier_to_read():
    assert [token_boxes.needs_white_text(c) for c in ("black", "#0072B2", "#08306b")] == [True] * 3
    assert [token_boxes.needs_white_text(c) for c in ("white", "#D55E00", "#6baed6")] == [False] * 3


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_pieces_are_the_tokens_in_two_colours_with_their_ids(name):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode("cut é漢 $x$")

    figure = tokenization_figure(tokenizer, "cut é漢 $x$")

    title, *texts = written(figure)
    assert title == f"{len(ids)} tokens, 13 bytes"
    notes = [text for text in texts if text.replace(" ", "").isdigit()]
    assert " ".join(notes) == " ".join(map(str, ids))
    assert len(notes) == len(figure.axes[0].patches)
    pair = [to_hex(PALE_BLUE), to_hex(PALE_ORANGE)]
    shown = [to_hex(face) for face in faces(figure)]
    assert shown == (pair * len(shown))[: len(shown)]
