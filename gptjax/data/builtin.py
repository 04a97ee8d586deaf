"""Built-in data sets, generated from files that ship with Python.

`word_tasks` are instructions with checkable answers. The words are taken from Python's
help topics; those of the test and validation splits occur in no training row. Prompts
start with the word, so that it has the same position in every task.

`python_lines` are lines of the standard library, labeled as code or prose.
"""

import ast
import hashlib
import inspect
import pkgutil
import random
import re
from collections.abc import Callable

from gptjax.data.datasets import read_python_help

WORD_TASKS = "word-tasks"
MIN_WORD_LETTERS, MAX_WORD_LETTERS = 3, 6
HELD_OUT_ROWS = {"test": 50, "validation": 20}  # rows per task
TEST_HASH_LIMIT, VALIDATION_HASH_LIMIT = 7, 10  # held out if the hash (0-99) is below
WORD_TASK_SEED = 0  # of the sample of words
EASY_WORD_TASKS = ("letters", "first letter")  # trained on half of the words

PYTHON_LINES = "python-lines"
# Pure-Python modules with many docstrings, present in all supported versions.
PYTHON_LINE_MODULES = (
    *("argparse", "calendar", "contextlib", "doctest", "heapq", "inspect", "pathlib"),
    *("random", "statistics", "subprocess", "textwrap", "threading", "zipfile"),
)
MIN_LINE_CHARS, MAX_LINE_CHARS = 20, 100


def pluralize(word: str) -> str:
    """Returns the regular English plural.

    >>> [pluralize(word) for word in ("sky", "day", "box", "match", "word")]
    ['skies', 'days', 'boxes', 'matches', 'words']
    """
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


# Prompt template and answer of each task.
WORD_TASK_RULES: dict[str, tuple[str, Callable[[str], str]]] = {
    "reverse": ("{} reversed", lambda word: word[::-1]),
    "capitals": ("{} uppercase", str.upper),
    "letters": ("{} length", lambda word: str(len(word))),
    "first letter": ("{} start", lambda word: word[0]),
    "last letter": ("{} end", lambda word: word[-1]),
    "plural": ("{} plural", pluralize),
    "spell": ("{} spelled", "-".join),
    "double": ("{} doubled", lambda word: f"{word} {word}"),
}


def split_words() -> dict[str, list[str]]:
    """Assigns words to splits by their hash; each split is in alphabetical order."""
    text = "\n".join(read_python_help()).lower()
    words: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in sorted(set(re.findall(r"[a-z]+", text))):
        if not MIN_WORD_LETTERS <= len(word) <= MAX_WORD_LETTERS or re.search(r"(.)\1\1", word):
            continue
        hash_value = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
        split = "validation" if hash_value < VALIDATION_HASH_LIMIT else "train"
        words["test" if hash_value < TEST_HASH_LIMIT else split].append(word)
    return words


def word_tasks() -> list[dict[str, str]]:
    """Returns rows with "task", "split", "prompt" and "completion"; deterministic."""
    rows = []
    rng = random.Random(WORD_TASK_SEED)  # noqa: S311 (data, not cryptography)
    for task, (prompt, complete) in WORD_TASK_RULES.items():
        for split, words in split_words().items():
            count = HELD_OUT_ROWS.get(split, len(words) // (2 if task in EASY_WORD_TASKS else 1))
            for word in rng.sample(words, min(count, len(words))):
                row = {"prompt": prompt.format(word), "completion": complete(word)}
                rows.append({"task": task, "split": split, **row})
    return rows


def python_lines() -> list[tuple[str, str, str]]:
    """Returns distinct (line, "code" or "prose", location), in module order."""
    rows: dict[str, tuple[str, str]] = {}
    for name in PYTHON_LINE_MODULES:
        text = inspect.getsource(pkgutil.resolve_name(name))
        docstring_numbers = docstring_line_numbers(text)
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.strip()
            has_valid_length = MIN_LINE_CHARS <= len(line) <= MAX_LINE_CHARS
            if has_valid_length and not line.startswith(("#", ">>>", "...", '"', "'")):
                kind = "prose" if number in docstring_numbers else "code"
                rows.setdefault(line, (f"{name}.py:{number}", kind))
    return [(line, kind, location) for line, (location, kind) in rows.items()]


def docstring_line_numbers(text: str) -> set[int]:
    """Returns the line numbers of a source text that lie inside docstrings."""
    numbers: set[int] = set()
    node_types = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, node_types) and ast.get_docstring(node) is not None:
            first = node.body[0]
            numbers |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return numbers
