"""Data sets generated from files that ship with Python."""

from collections import Counter

import pytest

from gptjax.data.builtin import (
    HELD_OUT_ROWS,
    WORD_TASK_RULES,
    docstring_line_numbers,
    pluralize,
    word_tasks,
)
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


def test_docstring_lines_are_found():
    assert docstring_line_numbers(PROGRAM) == {1, 2, 3, 9, 14}


def test_lines_of_python_are_distinct_and_of_both_classes():
    data, description = read_labeled_texts("python-lines")

    assert len(set(data.texts)) == len(data) > 2000
    assert data.class_names == ("code", "prose")
    assert min(Counter(data.labels).values()) > 500
    assert all(location.split(":")[0].endswith(".py") for location in data.locations)
    assert f"{len(data):,} texts" in description


@pytest.mark.fast
def test_word_tasks_are_distinct_repeatable_and_held_out_by_word():
    rows = word_tasks()

    assert rows == word_tasks()
    assert len({tuple(row.items()) for row in rows}) == len(rows)
    counts = Counter((row["task"], row["split"]) for row in rows)
    for task in WORD_TASK_RULES:
        assert {split: counts[task, split] for split in HELD_OUT_ROWS} == HELD_OUT_ROWS
        assert counts[task, "train"] > 300
    words = {
        split: {row["prompt"].split()[0] for row in rows if row["split"] == split}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, words.values())) == len(set().union(*words.values()))


def test_each_word_task_has_its_answer():
    answers = {task: complete("sky") for task, (_, complete) in WORD_TASK_RULES.items()}

    assert answers == {
        "reverse": "yks",
        "capitals": "SKY",
        "letters": "3",
        "first letter": "s",
        "last letter": "y",
        "plural": "skies",
        "spell": "s-k-y",
        "double": "sky sky",
    }
    assert all(prompt.startswith("{} ") for prompt, _ in WORD_TASK_RULES.values())
    assert pluralize("bus") == "buses"
