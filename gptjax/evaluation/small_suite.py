"""Small benchmark suite for models of the quickstart's size, on data of every machine.

All texts come with Python. Each task has questions with a few choices, such that a
model without the ability scores at the level of chance:

    last word     last word of sentences of help topics that the quickstart holds out
    brackets      closing bracket in code of the standard library
    indentation   indentation of the next line of such code
    copying       next word of a list that is repeated
    word rule     one of four rules, such as sky -> yks; nothing shows which
    word rule, 5-shot   the same after five examples of it

The last two have the same questions, so their difference is in-context learning
(Brown et al. 2020). The choice with the highest log-probability counts.
"""

import inspect
import math
import pkgutil
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from gptjax.config import find_config, load_config
from gptjax.data.datasets import (
    PYTHON_HELP,
    PYTHON_LINE_MODULES,
    WORD_TASK_RULES,
    read_python_help,
    split_words,
)
from gptjax.data.text import find_sources, hash_to_unit, make_split_rule
from gptjax.evaluation.multiple_choice import Question, grade_choices, score_choices
from gptjax.weights.model_folder import Model

NUM_QUESTIONS = 120  # per task
NUM_DISTRACTORS = 3  # of a last word
SUITE_SEED = 0
CONTEXT_LINES = 3  # of code before a question
MIN_LINE_CHARS, MAX_LINE_CHARS = 10, 90
BRACKETS = {"(": ")", "[": "]", "{": "}"}
INDENT = 4  # columns
COPIED_WORDS = 6
FEW_SHOTS = 5
RULES = ("reverse", "capitals", "plural", "double")
SENTENCE_PATTERN = re.compile(r"(?:[A-Za-z`’',()-]+ ){7,19}[A-Za-z]{4,}(?=\.\s)")


class TaskScore(NamedTuple):
    """Accuracy on one task."""

    accuracy: float
    standard_error: float
    chance: float  # accuracy of a random choice


def evaluate_suite(model: Model) -> dict[str, TaskScore]:
    """Evaluates a model on all tasks."""
    tasks = suite_questions()
    asked = [question for questions in tasks.values() for question in questions]
    scores = iter(score_choices(model, [x.context for x in asked], [x.choices for x in asked]))
    results = {}
    for name, questions in tasks.items():
        graded = [grade_choices(question, next(scores)) for question in questions]
        is_correct = [grades["acc"] for grades in graded]
        accuracy = sum(is_correct) / len(is_correct)
        error = math.sqrt(accuracy * (1 - accuracy) / len(is_correct))
        results[name] = TaskScore(accuracy, error, 1 / len(questions[0].choices))
    return results


def suite_questions() -> dict[str, list[Question]]:
    """Returns the questions of each task; the same wherever Python is the same."""
    tasks: dict[str, Callable[[random.Random], Iterable[Question]]] = {
        "last word": last_words,
        "brackets": brackets,
        "indentation": indentation,
        "copying": copying,
        "word rule": lambda rng: word_rules(rng, 0),
        f"word rule, {FEW_SHOTS}-shot": lambda rng: word_rules(rng, FEW_SHOTS),
    }
    return {
        name: list(make_questions(random.Random(SUITE_SEED)))  # noqa: S311 (data)
        for name, make_questions in tasks.items()
    }


def last_words(rng: random.Random) -> Iterator[Question]:
    """The last word of a sentence, or that of three other sentences."""
    data = load_config(find_config("quickstart")).data
    rule = make_split_rule(find_sources([PYTHON_HELP]), data.val_fraction, data.split_seed)
    held_out = [
        topic
        for n, topic in enumerate(read_python_help())
        if hash_to_unit(rule.seed, n) < rule.threshold
    ]
    lines = (" ".join(topic.split()) for topic in held_out)
    matches = {sentence for line in lines for sentence in SENTENCE_PATTERN.findall(line)}
    sentences = [sentence.rpartition(" ") for sentence in sorted(matches)]
    words = sorted({word for _, _, word in sentences})
    for context, _, word in rng.sample(sentences, min(NUM_QUESTIONS, len(sentences))):
        others = rng.sample([other for other in words if other != word], NUM_DISTRACTORS)
        yield Question(context, [f" {choice}" for choice in (word, *others)], 0, {})


def brackets(rng: random.Random) -> Iterator[Question]:
    """The bracket that closes the innermost open one of a line."""
    questions = []
    for context, line in code_lines():
        open_brackets: list[str] = []
        for n, char in enumerate(line):
            if char in BRACKETS:
                open_brackets.append(BRACKETS[char])
            elif char in BRACKETS.values():
                is_closed = bool(open_brackets) and open_brackets.pop() == char
                if is_closed and n >= MIN_LINE_CHARS:
                    choices = list(BRACKETS.values())
                    questions.append(Question(context + line[:n], choices, choices.index(char), {}))
    return balanced_sample(rng, questions)


def indentation(rng: random.Random) -> Iterator[Question]:
    """The next line of code: indented further, as much, or less than the one before."""
    questions = []
    for context, line in code_lines():
        before, after = (len(x) - len(x.lstrip()) for x in (context.split("\n")[-2], line))
        indents = [before + INDENT, before, before - INDENT]
        if min(indents) >= 0 and after in indents:
            choices = ["\n" + " " * indent + line.lstrip() for indent in indents]
            questions.append(Question(context[:-1], choices, indents.index(after), {}))
    return balanced_sample(rng, questions)


def code_lines() -> Iterator[tuple[str, str]]:
    """Yields the lines of code of the standard library, each after the lines before."""
    for name in PYTHON_LINE_MODULES:
        lines = inspect.getsource(pkgutil.resolve_name(name)).split("\n")
        for n in range(CONTEXT_LINES, len(lines)):
            window = lines[n - CONTEXT_LINES : n + 1]
            if all(line.strip() and len(line) <= MAX_LINE_CHARS for line in window):
                yield "".join(f"{line}\n" for line in window[:-1]), window[-1]


def copying(rng: random.Random) -> Iterator[Question]:
    """The last word of a list that is repeated, or another one of it."""
    words = split_words()["test"]
    for _ in range(NUM_QUESTIONS):
        *first, last = rng.sample(words, COPIED_WORDS)
        context = " ".join([*first, last, *first])
        yield Question(context, [f" {word}" for word in (last, *first)], 0, {})


def word_rules(rng: random.Random, num_shots: int) -> Iterator[Question]:
    """The word that a rule makes of a word, or that another rule makes of it."""
    words = split_words()["test"]
    rules = [WORD_TASK_RULES[name][1] for name in RULES]
    for n in range(NUM_QUESTIONS):
        answer = n % len(rules)
        *examples, word = rng.sample(words, FEW_SHOTS + 1)
        shots = [f"{example} -> {rules[answer](example)}\n" for example in examples[:num_shots]]
        yield Question(
            f"{''.join(shots)}{word} ->", [f" {rule(word)}" for rule in rules], answer, {}
        )


def balanced_sample(rng: random.Random, questions: list[Question]) -> Iterator[Question]:
    """Yields a sample in which each choice is equally often right."""
    num_choices = len(questions[0].choices)
    by_answer = [[q for q in questions if q.answer == n] for n in range(num_choices)]
    count = min(NUM_QUESTIONS // num_choices, *map(len, by_answer))
    for matching in by_answer:
        yield from rng.sample(matching, count)
