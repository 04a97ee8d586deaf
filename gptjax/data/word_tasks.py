"""Small tasks on words, with answers that can be checked: what the quickstart teaches.

The words are those of Python's help topics. A word of the test or the validation rows
is in no training row of any task. The word comes first, so that a task begins to read
it at the same place whatever is asked.
"""

import hashlib
import random
import re
from collections.abc import Callable

from gptjax.data.named import python_help

WORD_TASKS = "word-tasks"
SHORTEST, LONGEST = 3, 6  # letters of a word
HELD_OUT = {"test": 50, "validation": 20}  # rows of each task
TEST, VALIDATION = 7, 10  # percent of the words below which they are held out
SEED = 0  # of the draws of held-out rows


def plural(word: str) -> str:
    """The regular English plural.

    >>> [plural(word) for word in ("sky", "day", "box", "match", "word")]
    ['skies', 'days', 'boxes', 'matches', 'words']
    """
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


TASKS: dict[str, tuple[str, Callable[[str], str]]] = {  # name: how it is asked, answer
    "reverse": ("{} reversed", lambda word: word[::-1]),
    "capitals": ("{} uppercase", str.upper),
    "letters": ("{} length", lambda word: str(len(word))),
    "first letter": ("{} start", lambda word: word[0]),
    "last letter": ("{} end", lambda word: word[-1]),
    "plural": ("{} plural", plural),
    "spell": ("{} spelled", "-".join),
    "double": ("{} doubled", lambda word: f"{word} {word}"),
}
EASY = ("letters", "first letter")  # half of the words are enough for them


def split_words() -> dict[str, list[str]]:
    """The words of each split, in alphabetical order, by a hash of each."""
    text = "\n".join(python_help()).lower()
    words: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in sorted(set(re.findall(r"[a-z]+", text))):
        if not SHORTEST <= len(word) <= LONGEST or re.search(r"(.)\1\1", word):
            continue
        lot = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
        split = "validation" if lot < VALIDATION else "train"
        words["test" if lot < TEST else split].append(word)
    return words


def word_tasks() -> list[dict[str, str]]:
    """Rows of "task", "split", "prompt" and "completion", always the same ones."""
    rows = []
    lot = random.Random(SEED)
    for task, (asked, answer) in TASKS.items():
        for split, words in split_words().items():
            count = HELD_OUT.get(split, len(words) // (2 if task in EASY else 1))
            for word in lot.sample(words, min(count, len(words))):
                row = {"prompt": asked.format(word), "completion": answer(word)}
                rows.append({"task": task, "split": split, **row})
    return rows
