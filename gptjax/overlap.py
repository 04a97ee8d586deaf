"""Overlap of an answer with its reference: cheap indicators, not a quality measure.

Pure functions of texts with values from 0 to 1. A word is a lower-case run of letters
and digits of any script; all other characters, including underscores, are separators.
"""

import re
from collections import Counter
from collections.abc import Sequence

ANSWER_WORD_PATTERN = re.compile(r"[^\W_]+")


def normalize_answer(text: str) -> list[str]:
    """Splits a text into lower-case words.

    >>> normalize_answer("It's GPT-2, n_layers=12.")
    ['it', 's', 'gpt', '2', 'n', 'layers', '12']
    """
    return ANSWER_WORD_PATTERN.findall(text.lower())


def exact_match(answer: str, reference: str) -> float:
    """1 if both texts are equal up to surrounding whitespace, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the two bags of words (Rajpurkar et al. 2016, sec. 6.1).

    Unlike in SQuAD, articles count. The score is 1 if neither text has words, and 0 if
    only one has.

    >>> token_f1("The cat sat.", "the cat sat down")
    0.8571428571428571
    """
    answer_counts, reference_counts = (
        Counter(normalize_answer(answer)),
        Counter(normalize_answer(reference)),
    )
    total = answer_counts.total() + reference_counts.total()
    return 2 * (answer_counts & reference_counts).total() / total if total else 1.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, sec. 3.1, beta 1).

    For ASCII texts this equals rougeL of the package rouge_score without stemming; in
    particular, texts without words score 0, even if both have none.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    """
    answer_words, reference_words = (
        normalize_answer(answer),
        normalize_answer(reference),
    )
    length = lcs_length(answer_words, reference_words)
    if not length:
        return 0.0
    precision, recall = length / len(answer_words), length / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    >>> lcs_length("abcd", "acbd")
    3
    """
    previous_row = [0] * (
        len(second) + 1
    )  # LCS lengths of the items so far and each prefix
    for item in first:
        row = [0]
        for n, candidate in enumerate(second):
            row.append(
                previous_row[n] + 1
                if item == candidate
                else max(previous_row[n + 1], row[n])
            )
        previous_row = row
    return previous_row[-1]
