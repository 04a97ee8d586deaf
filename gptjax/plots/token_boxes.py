"""Figures of tokenized text: one box per token, wrapped over lines."""

import functools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from gptjax.plots.curves import GREY
from gptjax.runtime.terminal import sanitize

MAX_LINES = 40
MAX_TOKEN_LABEL_CHARS = 10  # longest token label on an axis

# In points. The figure is 5 inches wide: as many pixels as a phone screen.
FIGURE_WIDTH, FIGURE_MARGIN, FONT_SIZE, NOTE_FONT_SIZE = 360.0, 6.0, 10.0, 7.5
LINE_WIDTH = FIGURE_WIDTH - 2 * FIGURE_MARGIN
LINE_HEIGHT, BOX_HEIGHT, NOTE_HEIGHT = 16.0, 14.4, 9.5
LEGEND_GAP = 12.0  # between two boxes of a legend

FONT_FAMILIES = ["DejaVu Sans Mono", "DejaVu Sans"]  # both bundled with matplotlib
TEXT_STYLE: dict[str, Any] = {"parse_math": False, "fontfamily": FONT_FAMILIES}
WHITESPACE_MARKS = str.maketrans({"\n": "↵", "\t": "⇥"})


class Box(NamedTuple):
    """Box for one or more tokens, in Matplotlib colors."""

    text: str
    fill: Any
    text_color: Any = "black"
    note: str = ""  # small text below the box
    rule_position: float = 0.0  # of a line, as a fraction of the height; 0 for none


class PlacedBox(NamedTuple):
    """Position of a box, or of one line of a wrapped box."""

    box_index: int
    box: Box  # with the text of the line
    line: int
    left: float  # points
    width: float


def token_box_figure(
    boxes: Sequence[Box], title: str, legend: Sequence[Box] = (), bottom_space: float = 0.0
) -> Figure:
    """Draws boxes in wrapped lines on a figure of matching height.

    Boxes beyond `MAX_LINES` are counted in the title. The boxes of the legend explain
    the colors; `bottom_space` is left free (points).
    """
    placed = [one for one in layout_boxes(boxes) if one.line < MAX_LINES]
    if rest := len(boxes) - 1 - placed[-1].box_index:
        title += f"; the last {rest:,} boxes are not shown"
    pitch = LINE_HEIGHT + NOTE_HEIGHT * any(box.note for box in boxes)
    headings = textwrap.wrap(title, 58)
    top = FIGURE_MARGIN + 15 * len(headings) + 3
    bottom = top + pitch * (placed[-1].line + 1) + 6 * bool(legend)
    height = bottom + LINE_HEIGHT * bool(legend) + bottom_space + FIGURE_MARGIN
    figure = Figure((FIGURE_WIDTH / 72, height / 72), dpi=144)
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(0, FIGURE_WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(FIGURE_MARGIN, FIGURE_MARGIN, "\n".join(headings), fontsize=10, va="top")
    for one in placed:
        draw_box(axes, one, top + pitch * one.line)
    for one in layout_boxes(legend):
        draw_box(axes, one._replace(left=one.left + LEGEND_GAP * one.box_index), bottom)
    return figure


def layout_boxes(boxes: Iterable[Box]) -> Iterator[PlacedBox]:
    """Yields the position of each box; a long box is wrapped into several."""
    line, used = 0, 0.0
    for box_index, box in enumerate(boxes):
        for n, text in enumerate(split_for_width(box.text)):
            note = "" if n else shorten_label(box.note, 40)
            note_width = text_width(note, NOTE_FONT_SIZE) + 4 * bool(note)
            width = max(text_width(text), text_width("0"), note_width)  # joiners have no width
            if used + width > LINE_WIDTH:
                line, used = line + 1, 0.0
            part = box._replace(text=text, note=note)
            yield PlacedBox(box_index, part, line, FIGURE_MARGIN + used, width)
            used += width
            if text.endswith("↵"):
                line, used = line + 1, 0.0


def draw_box(axes: Any, placed: PlacedBox, top: float) -> None:
    """Draws a box on axes in points with the origin at the upper left."""
    box, left, width = placed.box, placed.left, placed.width
    outline = {"facecolor": box.fill, "edgecolor": "#D4D4D4", "linewidth": 0.6}
    axes.add_patch(Rectangle((left, top), width, BOX_HEIGHT, **outline))
    text_style = TEXT_STYLE | {"color": box.text_color, "fontsize": FONT_SIZE}
    axes.text(left, top + 0.75 * BOX_HEIGHT, box.text, **text_style)
    if box.rule_position:
        height = top + BOX_HEIGHT * box.rule_position
        axes.hlines(height, left + 1, left + width - 1, color=box.text_color, linewidth=1)
    if box.note:
        place = left + width / 2, top + BOX_HEIGHT + NOTE_HEIGHT * 0.75
        note_style = TEXT_STYLE | {"color": GREY, "fontsize": NOTE_FONT_SIZE}
        axes.text(*place, box.note, ha="center", **note_style)


def split_for_width(text: str) -> Iterator[str]:
    """Yields parts of a drawable text that fit a line, split at line breaks."""
    for rest in re.findall("[^↵]*↵+|[^↵]+", to_drawable(text)):
        while rest:
            lengths = range(len(rest), 0, -1)
            length = next(n for n in lengths if text_width(rest[:n]) <= LINE_WIDTH)
            yield rest[:length]
            rest = rest[length:]


def to_drawable(text: str) -> str:
    r"""Replaces invisible characters and those missing in the fonts by marks.

    >>> to_drawable("one\n\ttwo 文\x1b")
    'one↵⇥two □�'
    """
    visible = sanitize(text).translate(WHITESPACE_MARKS)
    fonts = [get_font(findfont(family)) for family in FONT_FAMILIES]
    return "".join(c if any(f.get_char_index(ord(c)) for f in fonts) else "□" for c in visible)


def token_label(token_bytes: bytes) -> str:
    r"""Returns a token as an axis label with visible spaces.

    >>> token_label(b" tea\n"), token_label(b"\xf0\x9f")
    ('␣tea↵', '\\xf0\\x9f')
    """
    text = to_drawable(token_bytes.decode("utf-8", "backslashreplace")).replace(" ", "␣")
    return shorten_label(text, MAX_TOKEN_LABEL_CHARS)


def shorten_label(text: str, max_chars: int) -> str:
    """Shortens a text to `max_chars` characters with an ellipsis."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float = FONT_SIZE) -> float:
    """Measures the width of a drawn text in points."""
    font = FontProperties(family=FONT_FAMILIES, size=size)
    return RendererAgg(1, 1, dpi=144).get_text_width_height_descent(text, font, False)[0] / 2
