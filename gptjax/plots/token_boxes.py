"""Figures of tokenized text: one box per token, wrapped over lines."""

import functools
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gptjax.plots.curves import GREY
from gptjax.runtime.terminal import sanitize

MAX_LINES = 40
MAX_TOKEN_LABEL_CHARS = 10  # longest token label on an axis

# In points. The figure is 5 inches wide: as many pixels as a phone screen.
FIGURE_WIDTH, FIGURE_MARGIN, CELLS_PER_LINE = 360.0, 6.0, 58
CELL_WIDTH = (FIGURE_WIDTH - 2 * FIGURE_MARGIN) / CELLS_PER_LINE
FONT_SIZE = CELL_WIDTH / 0.602  # DejaVu Sans Mono advances by 1233 / 2048 of its size
LINE_HEIGHT, BOX_HEIGHT, BASELINE_OFFSET, NOTE_HEIGHT = 16.0, 14.4, 10.8, 9.5
NOTE_FONT_SIZE = 7.5
NOTE_CHAR_CELLS = 0.602 * NOTE_FONT_SIZE / CELL_WIDTH  # width of a character of a note

FONT_FAMILIES = ["DejaVu Sans Mono", "DejaVu Sans"]  # both bundled with matplotlib
NEWLINE_MARK = "↵"
WHITESPACE_MARKS = str.maketrans({"\n": NEWLINE_MARK, "\t": "⇥"})
EDGE_COLOR = "#D4D4D4"
MISSING_GLYPH = "□"  # for characters missing in the fonts


class Box(NamedTuple):
    """Box for one or more tokens."""

    text: str
    fill: Any  # color
    text_color: Any = "black"  # color
    note: str = ""  # small text below the box
    # Position of a line, as a fraction of the height; 0 = none
    rule_position: float = 0.0


class PlacedBox(NamedTuple):
    """Position of a box, or of one line of a wrapped box."""

    box_index: int  # index of the box
    box: Box
    text: str
    note: str
    line: int
    column: float  # in cells
    width: float  # in cells


def token_box_figure(
    boxes: Sequence[Box], title: str, legend: Sequence[Box] = (), bottom_space: float = 0.0
) -> Figure:
    """Draws boxes in wrapped lines on a figure of matching height.

    Args:
        boxes: of a text; a last box counts those beyond `MAX_LINES`.
        title: above the boxes.
        legend: boxes below that explain the colors.
        bottom_space: free space at the bottom in points.
    """
    placed_boxes = list(layout_boxes(boxes))
    if placed_boxes[-1].line >= MAX_LINES:
        placed_boxes = [box for box in placed_boxes if box.line < MAX_LINES - 1]
        rest = len(boxes) - 1 - placed_boxes[-1].box_index
        (overflow,) = layout_boxes([Box(f"… {rest:,} more boxes", "white", GREY)])
        placed_boxes.append(overflow._replace(line=MAX_LINES - 1))
    pitch = LINE_HEIGHT + NOTE_HEIGHT * any(box.note for box in boxes)
    headings = textwrap.wrap(title, 58)
    top = FIGURE_MARGIN + 15 * len(headings) + 3
    bottom = top + pitch * (placed_boxes[-1].line + 1) + 6 * bool(legend)
    height = bottom + LINE_HEIGHT * bool(legend) + bottom_space + FIGURE_MARGIN
    figure = Figure((FIGURE_WIDTH / 72, height / 72), dpi=144)
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(0, FIGURE_WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(FIGURE_MARGIN, FIGURE_MARGIN, "\n".join(headings), fontsize=10, va="top")
    for placed_box in placed_boxes:
        draw_box(axes, placed_box, top + pitch * placed_box.line)
    column = 0.0
    for placed_box in layout_boxes(legend):
        draw_box(axes, placed_box._replace(column=column), bottom)
        column += placed_box.width + 2
    return figure


def layout_boxes(boxes: Iterable[Box]) -> Iterator[PlacedBox]:
    """Yields the position of each box; a long box is wrapped into several."""
    line, column = 0, 0.0
    for box_index, box in enumerate(boxes):
        for n, text in enumerate(split_for_width(box.text)):
            note = "" if n else shorten_label(box.note, 40)
            width = max(1.0, width_in_cells(text), len(note) * NOTE_CHAR_CELLS + 0.6 * bool(note))
            if column + width > CELLS_PER_LINE:
                line, column = line + 1, 0.0
            yield PlacedBox(box_index, box, text, note, line, column, width)
            column += width
            if text.endswith(NEWLINE_MARK):
                line, column = line + 1, 0.0


def draw_box(axes: Any, placed_box: PlacedBox, top: float) -> None:
    """Draws a box on axes in points with the origin at the upper left."""
    box = placed_box.box
    left = FIGURE_MARGIN + CELL_WIDTH * placed_box.column
    width = CELL_WIDTH * placed_box.width
    axes.add_patch(
        Rectangle((left, top), width, BOX_HEIGHT, facecolor=box.fill, edgecolor=EDGE_COLOR, lw=0.6)
    )
    text_style = {"parse_math": False, "fontfamily": FONT_FAMILIES}
    text = placed_box.text.lstrip()  # leading spaces only shift the text
    if text:
        start = left + CELL_WIDTH * (width_in_cells(placed_box.text) - width_in_cells(text))
        axes.text(
            start,
            top + BASELINE_OFFSET,
            text,
            color=box.text_color,
            fontsize=FONT_SIZE,
            **text_style,
        )
    if box.rule_position:
        height = top + BOX_HEIGHT * box.rule_position
        ends = [left + 1, left + width - 1]
        axes.add_line(Line2D(ends, [height, height], color=box.text_color, linewidth=1))
    if placed_box.note:
        place = left + width / 2, top + BOX_HEIGHT + NOTE_HEIGHT * 0.75
        axes.text(
            *place, placed_box.note, color=GREY, fontsize=NOTE_FONT_SIZE, ha="center", **text_style
        )


def split_for_width(text: str) -> Iterator[str]:
    """Yields parts of a drawable text that fit a line, split at line breaks."""
    fragment = ""
    for character in to_drawable(text):
        ended = fragment.endswith(NEWLINE_MARK) and character != NEWLINE_MARK
        if fragment and (ended or width_in_cells(fragment + character) > CELLS_PER_LINE):
            yield fragment
            fragment = ""
        fragment += character
    yield fragment


def to_drawable(text: str) -> str:
    r"""Replaces invisible characters and those missing in the fonts by marks.

    >>> to_drawable("one\n\ttwo 文\x1b")
    'one↵⇥two □�'
    """
    visible = sanitize(text).translate(WHITESPACE_MARKS)
    missing = {c for c in visible if not any(font_has_glyph(family, c) for family in FONT_FAMILIES)}
    return "".join(MISSING_GLYPH if c in missing else c for c in visible)


def token_label(token_bytes: bytes) -> str:
    r"""Returns a token as an axis label with visible spaces.

    >>> token_label(b" tea\n"), token_label(b"\xf0\x9f")
    ('␣tea↵', '\\xf0\\x9f')
    """
    return shorten_label(
        to_drawable(visible_text(token_bytes)).replace(" ", "␣"), MAX_TOKEN_LABEL_CHARS
    )


def shorten_label(text: str, max_chars: int) -> str:
    """Shortens a text to `max_chars` characters with an ellipsis."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def visible_text(token_bytes: bytes) -> str:
    """Decodes a token; invalid UTF-8 is shown in hexadecimal."""
    return token_bytes.decode("utf-8", errors="backslashreplace")


def width_in_cells(text: str) -> int:
    """Returns the width of a drawn text in cells."""
    return sum(map(char_width_in_cells, text))


@functools.lru_cache(maxsize=4096)
def char_width_in_cells(character: str) -> int:
    """Returns the width of a character in cells: 1 in the monospace font."""
    if font_has_glyph(FONT_FAMILIES[0], character):
        return 1
    font = get_font(findfont(FONT_FAMILIES[1]))
    font.set_size(FONT_SIZE, 72)
    return math.ceil(font.load_char(ord(character)).linearHoriAdvance / 65536 / CELL_WIDTH)


def font_has_glyph(family: str, character: str) -> bool:
    """True if the font has a glyph for the character."""
    return get_font(findfont(family)).get_char_index(ord(character)) > 0


def needs_white_text(color: Any) -> bool:
    """True if white text has more contrast on a color than black text.

    Contrast as in WCAG 2.2; luminance 0.18 has equal contrast to black and white.
    """
    return float(np.power(to_rgb(color), 2.2) @ (0.2126, 0.7152, 0.0722)) < 0.18
