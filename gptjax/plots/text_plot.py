"""Curve in a terminal, drawn with Braille characters of 2 x 4 dots."""

from collections.abc import Sequence

import numpy as np

from gptjax.training.metrics import format_number

BRAILLE_BLANK = 0x2800  # U+2800; a dot adds its bit
DOT_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
AXIS_LABEL_WIDTH = 8  # of the y axis
MIN_PLOT_COLUMNS, MIN_PLOT_ROWS = 8, 3

Points = tuple[Sequence[int | float], Sequence[int | float]]  # x and y


def text_plot(
    curve: Points, marks: Points, *, columns: int, rows: int, ascii_only: bool = False
) -> list[str]:
    """Draws a curve over steps, and marks, in at most `columns` x `rows` characters.

    Points that are not finite are left out. Without points there are no lines.
    """
    curve_x, curve_y = finite_points(curve)
    marks_x, marks_y = finite_points(marks)
    all_x, all_y = np.append(curve_x, marks_x), np.append(curve_y, marks_y)
    if not len(all_x):
        return []
    width = max(columns - AXIS_LABEL_WIDTH - 1, MIN_PLOT_COLUMNS)
    height = max(rows - 2, MIN_PLOT_ROWS)
    right, (low, high) = max(float(all_x.max()), 1.0), padded_range(all_y)

    def to_dots(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column = x / right * (2 * width - 1)
        row = (high - y) / (high - low) * (4 * height - 1)
        return column.round().astype(int), row.round().astype(int)

    cells = draw_dots(*to_dots(curve_x, curve_y), width, height)
    glyphs = np.array([" ", "*"])[np.minimum(cells, 1)] if ascii_only else to_braille(cells)
    for column, row in zip(*to_dots(marks_x, marks_y), strict=True):
        glyphs[row // 4, column // 2] = "o" if ascii_only else "●"
    labels = {0: high, (height - 1) // 2: None, height - 1: low}
    labels[(height - 1) // 2] = high + (low - high) * ((height - 1) // 2) / (height - 1)
    bar, corner, line = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    lines = []
    for row, glyph_row in enumerate(glyphs):
        label = f"{labels[row]:.4g}" if row in labels else ""
        lines.append(f"{label:>{AXIS_LABEL_WIDTH - 1}} {bar}{''.join(glyph_row)}".rstrip())
    lines.append(" " * AXIS_LABEL_WIDTH + corner + line * width)
    lines.append(
        " " * (AXIS_LABEL_WIDTH + 1) + "0" + f"step {format_number(right)}".rjust(width - 1)
    )
    return lines


def finite_points(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Points with a finite y, ordered by x."""
    x, y = (np.asarray(values, np.float64) for values in points)
    order = np.argsort(x, kind="stable")
    order = order[np.isfinite(y[order])]
    return x[order], y[order]


def padded_range(values: np.ndarray) -> tuple[float, float]:
    """Minimum and maximum, which differ."""
    low, high = float(values.min()), float(values.max())
    if low < high:
        return low, high
    half = max(abs(low), 1.0) / 2
    return low - half, high + half


def draw_dots(column: np.ndarray, row: np.ndarray, width: int, height: int) -> np.ndarray:
    """Braille bits of each cell, for a curve through dots.

    Of several dots in a column the mean is drawn; between columns the curve is linear.
    """
    cells = np.zeros((height, width), int)
    if not len(column):
        return cells
    known = np.unique(column)
    means = [row[column == x].mean() for x in known]
    previous = round(float(means[0]))
    for x in range(known[0], known[-1] + 1):
        y = round(float(np.interp(x, known, means)))
        start = previous + int(np.sign(y - previous))
        for dot in range(min(start, y), max(start, y) + 1):
            cells[dot // 4, x // 2] |= DOT_BITS[dot % 4, x % 2]
        previous = y
    return cells


def to_braille(cells: np.ndarray) -> np.ndarray:
    """Characters of cells with Braille bits; a space for an empty cell."""
    return np.vectorize(lambda bits: chr(BRAILLE_BLANK + bits) if bits else " ")(cells)
