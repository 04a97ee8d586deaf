"""How much of a reference an answer repeats: a cheap hint, no measure of quality.

Pure functions of texts, all from 0 to 1. A word is a run of letters and digits of any
script, in lower case; what stands between words, the underscore too, does not count.
"""

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words of a text.

    >>> words("It's GPT-2, n_layers=12.")
    ['it', 's', 'gpt', '2', 'n', 'layers', '12']
    """
    return WORD.findall(text.lower())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same but for white space around them, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the two bags of words (Rajpurkar et al. 2016, sec. 6.1).

    Words are those of `words`: lower case, runs of letters and digits. Unlike there,
    articles count. Two texts without words are alike (1); one without is not (0).

    >>> token_f1("The cat sat.", "the cat sat down")
    0.8571428571428571
    """
    one, other = Counter(words(answer)), Counter(words(reference))
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, sec. 3.1, beta 1).

    For ASCII texts it is the rougeL of the package rouge_score without its stemmer,
    so that texts without words score 0, even two of them.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    """
    one, other = words(answer), words(reference)
    length = common_length(one, other)
    if not length:
        return 0.0
    precision, recall = length / len(one), length / len(other)
    return 2 * precision * recall / (precision + recall)


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    >>> common_length("abcd", "acbd")
    3
    """
    above = [0] * (len(other) + 1)  # of the items before, and each prefix of other
    for item in one:
        row = [0]
        for n, candidate in enumerate(other):
            row.append(above[n] + 1 if item == candidate else max(above[n + 1], row[n]))
        above = row
    return above[-1]
