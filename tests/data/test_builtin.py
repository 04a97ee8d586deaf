"""Data sets generated from files that ship with Python."""

from collections import Counter

from gptjax.data.builtin import HELD_OUT_ROWS, WORD_TASK_RULES, docstring_line_numbers, word_tasks
from gptjax.data.classification import read_labeled_texts


def test_lines_of_python_are_distinct_and_labeled_by_docstring():
    source = 'class A:\n  """One.\n\n  Two."""\n  x = """none"""\n  def f(self):\n    "Another."\n'

    data, _ = read_labeled_texts("python-lines")

    assert docstring_line_numbers(source) == {2, 3, 4, 7}
    assert len(set(data.texts)) == len(data) > 2000
    assert data.class_names == ("code", "prose")
    assert min(Counter(data.labels).values()) > 500
    assert data.labels[data.texts.index("class ArgumentTypeError(Exception):")] == 0


def test_word_tasks_have_their_answers_and_are_held_out_by_word():
    rows = word_tasks()

    assert rows == word_tasks()
    assert len({tuple(row.items()) for row in rows}) == len(rows)
    counts = Counter((row["task"], row["split"]) for row in rows)
    for task in WORD_TASK_RULES:
        assert {split: counts[task, split] for split in HELD_OUT_ROWS} == HELD_OUT_ROWS
        assert counts[task, "train"] > 300
    words = [
        {row["prompt"].split()[0] for row in rows if row["split"] == split}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, words)) == len(set().union(*words))
    answers = [complete("sky") for _, complete in WORD_TASK_RULES.values()]
    assert answers == ["yks", "SKY", "3", "s", "y", "skies", "s-k-y", "sky sky"]
