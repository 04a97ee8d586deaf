"""The labelled lines of Python's own library."""

from collections import Counter

import pytest

from gptjax.data.builtin import docstring_line_numbers, python_lines
from gptjax.data.classification import read_labeled_texts

PROGRAM = '''"""A module.

Two lines of prose."""

import sys


class A:
    """One."""

    text = """no docstring"""

    def f(self):
        "Another."
        return sys
'''


def test_the_lines_of_docstrings_are_those_and_no_others():
    assert docstring_line_numbers(PROGRAM) == {1, 2, 3, 9, 14}


@pytest.mark.fast
def test_every_line_comes_once_with_its_place():
    rows = python_lines()

    lines = [line for line, _, _ in rows]
    assert len(set(lines)) == len(lines) > 2000
    kinds = Counter(kind for _, kind, _ in rows)
    assert set(kinds) == {"code", "prose"}
    assert min(kinds.values()) > 500
    assert rows == python_lines()
    assert all(place.split(":")[0].endswith(".py") for _, _, place in rows)


def test_the_set_has_a_name():
    data, said = read_labeled_texts("python-lines")

    assert data.class_names == ("code", "prose")
    assert len(data) == len(python_lines())
    assert "lines of Python's standard library" in said
