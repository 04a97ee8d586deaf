"""The small suite asks fair questions, and counts the right answers."""

from collections import Counter

import pytest

from gptjax.data.datasets import read_python_help
from gptjax.evaluation import small_suite
from tests.small_models import make_model

TASKS = small_suite.suite_questions()


@pytest.mark.parametrize("name", TASKS)
def test_a_guess_scores_at_the_level_of_chance(name):
    questions = TASKS[name]
    num_choices = len(questions[0].choices)

    assert len(questions) > 80
    assert all(len(set(q.choices)) == num_choices for q in questions)
    if name not in ("last word", "copying"):  # their choices are in no order
        right = Counter(q.answer for q in questions)
        assert sorted(right) == list(range(num_choices))
        assert len(set(right.values())) == 1


def test_the_right_choice_continues_the_text_that_it_is_from():
    topics = " ".join(" ".join(read_python_help()).split())
    for context, choices, answer, _ in TASKS["last word"]:
        assert f"{context}{choices[answer]}." in topics
    for context, choices, answer, _ in TASKS["copying"]:
        words = f"{context}{choices[answer]}".split()
        assert words[: len(words) // 2] == words[len(words) // 2 :]
    for context, choices, answer, _ in TASKS["brackets"]:
        line = context.split("\n")[-1] + choices[answer]
        brackets = "".join(char for char in line if char in "()[]{}")
        for _ in line:
            brackets = brackets.replace("()", "").replace("[]", "").replace("{}", "")
        assert not brackets.endswith(tuple(")]}"))
    for zero, few in zip(*(TASKS[name] for name in list(TASKS)[-2:]), strict=True):
        assert (zero.choices, zero.answer) == (few.choices, few.answer)
        assert few.context.endswith(f"\n{zero.context}")


@pytest.mark.parametrize("is_right", [True, False])
def test_the_most_likely_choice_counts(monkeypatch, is_right):
    right = {(q.context, q.choices[q.answer]) for task in TASKS.values() for q in task}

    def score_choices(model, contexts, choices):
        def score(x):
            return -1.0 if (x in right) == is_right else -2.0

        pairs = zip(contexts, choices, strict=True)
        return [[score((context, choice)) for choice in some] for context, some in pairs]

    monkeypatch.setattr(small_suite, "score_choices", score_choices)

    scores = small_suite.evaluate_suite(make_model())

    del scores["word rule"]  # the same question has different answers
    assert {x.accuracy for x in scores.values()} == {float(is_right)}
    assert scores["brackets"].chance == pytest.approx(1 / 3)
