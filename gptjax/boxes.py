"""A text as a picture of its tokens: boxes over wrapped lines, as high as it needs."""

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

from gptjax.report import GREY
from gptjax.terminal import printable

MOST_LINES = 40
LABEL_CHARACTERS = 10  # of a token beside a panel or a bar

# Points of a figure that is 5 inches wide: as many pixels as a phone has.
WIDTH, MARGIN, COLUMNS = 360.0, 6.0, 58
CELL = (WIDTH - 2 * MARGIN) / COLUMNS
SIZE = CELL / 0.602  # DejaVu Sans Mono advances by 1233 / 2048 of its size
LINE, BOX, BASELINE, NOTE = 16.0, 14.4, 10.8, 9.5
NOTE_SIZE = 7.5
NOTE_CELL = 0.602 * NOTE_SIZE / CELL  # in cells of the text

FAMILY = ["DejaVu Sans Mono", "DejaVu Sans"]  # both come with matplotlib
BREAK = "↵"
MARKS = str.maketrans({"\n": BREAK, "\t": "⇥"})
EDGE = "#D4D4D4"
LACKING = "□"  # for what the fonts do not have


class Box(NamedTuple):
    """One or more tokens in a picture of a text."""

    text: str
    face: Any  # colour
    ink: Any = "black"  # colour
    note: str = ""  # small, below
    rule: float = 0.0  # a line at this part of its height; 0 = none


class Spot(NamedTuple):
    """Where a box, or a part of one that goes over several lines, is drawn."""

    number: int  # of the box
    box: Box
    text: str
    note: str
    line: int
    column: float  # in cells
    width: float  # in cells


def boxed(
    boxes: Sequence[Box], title: str, legend: Sequence[Box] = (), foot: float = 0.0
) -> Figure:
    """Boxes in wrapped lines on a figure as high as they need.

    Args:
        boxes: of a text; those beyond `MOST_LINES` are counted in a last one.
        title: above them.
        legend: boxes that explain them, below.
        foot: points to leave free at the bottom.
    """
    spots = list(spread(boxes))
    if spots[-1].line >= MOST_LINES:
        spots = [spot for spot in spots if spot.line < MOST_LINES - 1]
        rest = len(boxes) - 1 - spots[-1].number
        (more,) = spread([Box(f"… {rest:,} more boxes", "white", GREY)])
        spots.append(more._replace(line=MOST_LINES - 1))
    pitch = LINE + NOTE * any(box.note for box in boxes)
    headings = textwrap.wrap(title, 58)
    top = MARGIN + 15 * len(headings) + 3
    bottom = top + pitch * (spots[-1].line + 1) + 6 * bool(legend)
    height = bottom + LINE * bool(legend) + foot + MARGIN
    figure = Figure((WIDTH / 72, height / 72), dpi=144)
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(MARGIN, MARGIN, "\n".join(headings), fontsize=10, va="top")
    for spot in spots:
        draw(axes, spot, top + pitch * spot.line)
    column = 0.0
    for spot in spread(legend):
        draw(axes, spot._replace(column=column), bottom)
        column += spot.width + 2
    return figure


def spread(boxes: Iterable[Box]) -> Iterator[Spot]:
    """A place for each box, or for each part of one that goes over several lines."""
    line, column = 0, 0.0
    for number, box in enumerate(boxes):
        for n, text in enumerate(fragments(box.text)):
            note = "" if n else shortened(box.note, 40)
            width = max(1.0, cells(text), len(note) * NOTE_CELL + 0.6 * bool(note))
            if column + width > COLUMNS:
                line, column = line + 1, 0.0
            yield Spot(number, box, text, note, line, column, width)
            column += width
            if text.endswith(BREAK):
                line, column = line + 1, 0.0


def draw(axes: Any, spot: Spot, top: float) -> None:
    """Draws a box on axes whose unit is a point, counted from the upper left."""
    box, left, width = spot.box, MARGIN + CELL * spot.column, CELL * spot.width
    axes.add_patch(
        Rectangle((left, top), width, BOX, facecolor=box.face, edgecolor=EDGE, lw=0.6)
    )
    plain = {"parse_math": False, "fontfamily": FAMILY}
    text = spot.text.lstrip()  # blanks are room
    if text:
        start = left + CELL * (cells(spot.text) - cells(text))
        axes.text(start, top + BASELINE, text, color=box.ink, fontsize=SIZE, **plain)
    if box.rule:
        height = top + BOX * box.rule
        ends = [left + 1, left + width - 1]
        axes.add_line(Line2D(ends, [height, height], color=box.ink, linewidth=1))
    if spot.note:
        place = left + width / 2, top + BOX + NOTE * 0.75
        axes.text(
            *place, spot.note, color=GREY, fontsize=NOTE_SIZE, ha="center", **plain
        )


def fragments(text: str) -> Iterator[str]:
    """A text as it is drawn, in parts that fit a line; a line break ends one."""
    part = ""
    for character in drawable(text):
        ended = part.endswith(BREAK) and character != BREAK
        if part and (ended or cells(part + character) > COLUMNS):
            yield part
            part = ""
        part += character
    yield part


def drawable(text: str) -> str:
    r"""The text with a mark for what cannot be seen or is not in the fonts.

    >>> drawable("one\n\ttwo 文\x1b")
    'one↵⇥two □�'
    """
    shown = printable(text).translate(MARKS)
    lacking = {c for c in shown if not any(has(family, c) for family in FAMILY)}
    return "".join(LACKING if c in lacking else c for c in shown)


def label_of(piece: bytes) -> str:
    r"""A token as the label of an axis, its blanks marked.

    >>> label_of(b" tea\n"), label_of(b"\xf0\x9f")
    ('␣tea↵', '\\xf0\\x9f')
    """
    return shortened(drawable(readable(piece)).replace(" ", "␣"), LABEL_CHARACTERS)


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= most else text[: most - 1] + "…"


def readable(piece: bytes) -> str:
    """The text of a token; bytes that are no characters in hexadecimal."""
    return piece.decode("utf-8", errors="backslashreplace")


def cells(text: str) -> int:
    """The width of a drawn text."""
    return sum(map(cells_of, text))


@functools.lru_cache(maxsize=4096)
def cells_of(character: str) -> int:
    """The width of a character: 1, or where it is of the second font what it takes."""
    if has(FAMILY[0], character):
        return 1
    font = get_font(findfont(FAMILY[1]))
    font.set_size(SIZE, 72)
    return math.ceil(font.load_char(ord(character)).linearHoriAdvance / 65536 / CELL)


def has(family: str, character: str) -> bool:
    """Whether a font has a character."""
    return get_font(findfont(family)).get_char_index(ord(character)) > 0


def dark(colour: Any) -> bool:
    """Whether white text is easier to read on a colour than black.

    Contrast as WCAG 2.2 has it; 0.18 is as far from black as from white.
    """
    return float(np.power(to_rgb(colour), 2.2) @ (0.2126, 0.7152, 0.0722)) < 0.18
