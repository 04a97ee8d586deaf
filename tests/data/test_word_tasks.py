from collections import Counter

import pytest

from gptjax.data.builtin import HELD_OUT_ROWS, WORD_TASK_RULES, pluralize, word_tasks


@pytest.mark.fast
def test_the_rows_are_always_the_same_and_none_comes_twice():
    rows = word_tasks()

    assert rows == word_tasks()
    assert len({tuple(row.items()) for row in rows}) == len(rows)
    counts = Counter((row["task"], row["split"]) for row in rows)
    for task in WORD_TASK_RULES:
        assert counts[task, "test"] == HELD_OUT_ROWS["test"]
        assert counts[task, "validation"] == HELD_OUT_ROWS["validation"]
        assert counts[task, "train"] > 300


def test_no_held_out_word_is_in_a_training_row():
    words = {"train": set(), "validation": set(), "test": set()}
    for row in word_tasks():
        words[row["split"]].add(row["prompt"].split()[0])

    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not words[one] & words[other]
    assert all(words.values())


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("reverse", "yks"),
        ("capitals", "SKY"),
        ("letters", "3"),
        ("first letter", "s"),
        ("last letter", "y"),
        ("plural", "skies"),
        ("spell", "s-k-y"),
        ("double", "sky sky"),
    ],
)
def test_each_task_has_its_answer(task, answer):
    asked, solve = WORD_TASK_RULES[task]

    assert solve("sky") == answer
    assert asked.format("sky").startswith("sky ")


def test_plurals_are_regular():
    assert [pluralize(word) for word in ("bus", "key", "copy", "wish", "type")] == [
        *("buses", "keys", "copies", "wishes", "types")
    ]
