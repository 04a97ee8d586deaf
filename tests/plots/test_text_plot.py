"""The curve of `gptjax watch` in a terminal."""

import numpy as np

from gptjax.plots.text_plot import AXIS_LABEL_WIDTH, BRAILLE_BLANK, text_plot


def dots(lines):
    """(column, row) of each dot, from the upper left corner."""
    bits = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}
    found = set()
    for row, line in enumerate(lines):
        for column, character in enumerate(line[AXIS_LABEL_WIDTH + 1 :]):
            code = ord(character) - BRAILLE_BLANK
            offsets = [bits[n] for n in range(8) if 0 < code < 256 and code >> n & 1]
            found |= {(2 * column + x, 4 * row + y) for x, y in offsets}
    return found


def test_a_line_has_a_dot_in_each_column_and_marks_are_where_their_values_are():
    lines = text_plot(([0, 50, 100], [3, 2, 1]), ([100], [3]), columns=49, rows=12)

    found = sorted(dots(lines[:-2]))
    assert [x for x, _ in found] == list(range(80))
    assert np.abs(np.polyfit(*zip(*found, strict=True), 1) - [39 / 79, 0]).max() < 0.1
    assert lines[0].endswith("●")
    assert len(lines[0]) == 49
    assert [line.split()[0] for line in (lines[0], lines[9])] == ["3", "1"]
    assert lines[-1].endswith("step 100")
    assert {len(line) <= 49 for line in lines} == {True}


def test_points_may_be_missing_equal_or_not_finite():
    assert text_plot(([], []), ([], []), columns=40, rows=8) == []
    assert text_plot(([1], [float("nan")]), ([], []), columns=40, rows=8) == []
    assert len(dots(text_plot(([5], [2.0]), ([], []), columns=40, rows=8))) == 1
    flat = text_plot(([1, 2, 3], [2, float("inf"), 2]), ([], []), columns=40, rows=8)
    assert len({row for _, row in dots(flat)}) == 1
    assert len(text_plot(([1, 2], [2, 1]), ([0], [3]), columns=1, rows=1)) == 5


def test_it_can_do_without_braille():
    lines = text_plot(([0, 1], [2, 1]), ([1], [2]), columns=40, rows=8, ascii_only=True)

    assert "".join(lines).isascii()
    assert (lines[0][9], lines[0][-1], lines[5][-1]) == ("*", "o", "*")
