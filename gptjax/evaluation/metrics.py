"""Metrics of classifiers and of answers, with confidence intervals.

C is the number of classes, n the number of examples. The metrics of classes agree with
scikit-learn's with `zero_division=0`.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Real

NUM_RESAMPLES = 2_000
MetricValues = dict[str, float | int | None]  # by name

ANSWER_WORD_PATTERN = re.compile(r"[^\W_]+")


class ClassificationMetrics(NamedTuple):
    """Classification metrics from 0 to 1; tuples have one entry per class."""

    accuracy: float
    macro_f1: float  # mean over classes with true or predicted examples
    balanced_accuracy: float  # mean recall over classes with true examples
    precision: tuple[float, ...]  # 0 for classes never predicted
    recall: tuple[float, ...]  # 0 for classes without true examples
    f1: tuple[float, ...]
    count: tuple[int, ...]  # true examples


def confusion_matrix(
    true: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], num_classes: int
) -> Int[np.ndarray, "C C"]:
    """Counts examples by true class (row) and predicted class (column)."""
    cell = true.astype(np.int64) * num_classes + predicted
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_metrics(confusion_CC: Int[np.ndarray, "C C"]) -> ClassificationMetrics:
    """Computes all metrics from a confusion matrix."""
    correct_C, count_C = confusion_CC.diagonal(), confusion_CC.sum(axis=1)
    predicted_C = confusion_CC.sum(axis=0)
    recall_C = correct_C / np.maximum(count_C, 1)
    f1_C = 2 * correct_C / np.maximum(count_C + predicted_C, 1)
    return ClassificationMetrics(
        accuracy=float(correct_C.sum() / count_C.sum()),
        macro_f1=float(f1_C[count_C + predicted_C > 0].mean()),
        balanced_accuracy=float(recall_C[count_C > 0].mean()),
        precision=tuple((correct_C / np.maximum(predicted_C, 1)).tolist()),
        recall=tuple(recall_C.tolist()),
        f1=tuple(f1_C.tolist()),
        count=tuple(count_C.tolist()),
    )


def mean_ci(
    values: Sequence[int | float] | Real[np.ndarray, " n"] | Bool[np.ndarray, " n"],
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean (Efron & Tibshirani 1993, ch. 13).

    If all values are equal, the interval is a point and carries no information.
    """
    offsets = np.asarray(values, np.float64) - values[0]  # exact 0 if all are equal
    rng, n = np.random.default_rng(0), len(values)
    means = [offsets[rng.integers(n, size=n)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = values[0] + np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def proportion_ci(successes: int, trials: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927); not a single point at 0 and 1.

    >>> low, high = proportion_ci(60, 60)
    >>> print(f"{low:.2f} {high:.2f}")
    0.94 1.00
    """
    z2 = statistics.NormalDist().inv_cdf(0.975) ** 2
    rate = successes / trials
    half_width = math.sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2)))
    low, high = (rate + z2 / (2 * trials) + side * half_width for side in (-1, 1))
    return low / (1 + z2 / trials), high / (1 + z2 / trials)


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
    answer_counts = Counter(normalize_answer(answer))
    reference_counts = Counter(normalize_answer(reference))
    total = answer_counts.total() + reference_counts.total()
    return 2 * (answer_counts & reference_counts).total() / total if total else 1.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, sec. 3.1, beta 1).

    Equals rougeL of the package rouge_score without stemming for ASCII texts. Texts
    without words score 0, even if both have none.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    """
    answer_words, reference_words = normalize_answer(answer), normalize_answer(reference)
    # Of the longest subsequence that the words so far share with each reference prefix.
    length = [0] * (len(reference_words) + 1)
    for word in answer_words:
        diagonal = 0
        for n, other in enumerate(reference_words, 1):
            longest = diagonal + 1 if word == other else max(length[n], length[n - 1])
            diagonal, length[n] = length[n], longest
    total = len(answer_words) + len(reference_words)
    return 2 * length[-1] / total if total else 0.0
