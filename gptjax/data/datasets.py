"""Named data sets: files, and data generated from files that ship with Python.

A file is looked up in `$GPTJAX_DATA` and the cache, else downloaded. It is accepted
only if its size and SHA-256 equal the ones pinned here.

`word_tasks` are instructions with checkable answers. The words are taken from Python's
help topics; those of the test and validation splits occur in no training row. Prompts
start with the word, so that it has the same position in every task.

`python_lines` are lines of the standard library, labeled as code or prose.
"""

import ast
import hashlib
import inspect
import os
import pkgutil
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptjax.config import did_you_mean
from gptjax.errors import DataError
from gptjax.fileio.download import Pin, check_pin, download_file
from gptjax.fileio.paths import user_cache_dir, user_path


class DatasetFile(NamedTuple):
    """File with pinned size and hash."""

    file_name: str  # name in $GPTJAX_DATA and in the cache
    pin: Pin
    url: str


BOOK_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
PYTHON_HELP = "python-help"  # no file: the text ships with Python
DATASETS = {
    "verdict": DatasetFile(  # Edith Wharton, 1908
        "the-verdict.txt",
        Pin(20_479, "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"),
        BOOK_URL + "ch02/01_main-chapter-code/the-verdict.txt",
    ),
    "tinyshakespeare": DatasetFile(
        "tinyshakespeare.txt",
        Pin(1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    "wikitext2": DatasetFile(  # validation split: Merity et al. 2016, CC BY-SA
        "wikitext2-valid.txt",
        Pin(1_121_681, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
        "https://raw.githubusercontent.com/pytorch/examples/main/"
        "word_language_model/data/wikitext-2/valid.txt",
    ),
    "instructions": DatasetFile(
        "instruction-data.json",
        Pin(203_524, "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
        BOOK_URL + "ch07/01_main-chapter-code/instruction-data.json",
    ),
    "preferences": DatasetFile(
        "instruction-data-with-preference.json",
        Pin(386_968, "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e"),
        BOOK_URL + "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
    ),
    "sms-spam": DatasetFile(  # Almeida and Gómez Hidalgo 2011; UCI dataset 228, CC BY
        "SMSSpamCollection",
        Pin(477_907, "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"),
        "https://raw.githubusercontent.com/learn-co-students/"
        "dsc-document-classification-with-naive-bayes-lab-online-ds-pt-051319/"
        "2f98ca443ecd26e1088b369260f1e9782e2e36fc/SMSSpamCollection",
    ),
}


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


def read_python_help() -> list[str]:
    """Returns the texts of Python's help topics, sorted by name."""
    from pydoc_data.topics import topics  # 0.7 MB, needed only here

    return [topics[name] for name in sorted(topics)]


def fetch_dataset(name: str) -> Path:
    """Returns the path of a named data set, downloading it if necessary."""
    if name not in DATASETS:
        raise DataError(
            f"unknown data set {name!r}.{did_you_mean(name, DATASETS)} "
            f"Known: {', '.join(DATASETS)}."
        )
    entry, user_dir = DATASETS[name], os.environ.get("GPTJAX_DATA")
    path = user_path(user_dir) / entry.file_name if user_dir else None
    if path is None or not path.exists():
        path = user_cache_dir("data") / entry.file_name
    if path.exists():
        check_pin(path, entry.pin, f"Replace or remove {path}.")
    else:
        download_file(entry.url, entry.pin, path, f"data set {name}")
    return path


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
        for number, raw in enumerate(text.split("\n"), 1):
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
