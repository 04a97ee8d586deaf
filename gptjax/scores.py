"""How well classes are told apart: counts, rates, their uncertainty.

Pure functions over NumPy. C is the number of classes, n that of the examples. The
rates are those of scikit-learn with `zero_division=0`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Real

from gptjax.errors import DataError

RESAMPLES = 2_000
VALUES = 1_000_000  # drawn at once


class Scores(NamedTuple):
    """Rates from 0 to 1; the tuples have one number for each class."""

    accuracy: float
    macro_f1: float  # over the classes that occur in truth or prediction
    balanced_accuracy: float  # mean recall over the classes that occur in truth
    precision: tuple[float, ...]  # 0 for a class that is never predicted
    recall: tuple[float, ...]  # 0 for a class that does not occur
    f1: tuple[float, ...]
    count: tuple[int, ...]  # examples of the class


def confusion(
    true: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "C C"]:
    """How many examples of each true class (row) are predicted as each (column).

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    for numbers in (true, predicted):
        if np.any((numbers < 0) | (numbers >= classes)):
            raise DataError(
                f"classes are numbered {numbers.min()} to {numbers.max()}, but there "
                f"are {classes}: 0 to {classes - 1}. Number them from 0."
            )
    cell = true.astype(np.int64) * classes + predicted
    return np.bincount(cell, minlength=classes**2).reshape(classes, classes)


def scores(matrix_CC: Int[np.ndarray, "C C"]) -> Scores:
    """All rates of a confusion matrix.

    >>> scores(np.array([[1, 1], [0, 1]])).recall
    (0.5, 1.0)
    """
    right_C, count_C = matrix_CC.diagonal(), matrix_CC.sum(axis=1)
    predicted_C = matrix_CC.sum(axis=0)
    if not count_C.any():
        raise DataError("there is no example to score. Give a set that is not empty.")
    recall_C = right_C / np.maximum(count_C, 1)
    f1_C = 2 * right_C / np.maximum(count_C + predicted_C, 1)
    return Scores(
        accuracy=float(right_C.sum() / count_C.sum()),
        macro_f1=float(f1_C[count_C + predicted_C > 0].mean()),
        balanced_accuracy=float(recall_C[count_C > 0].mean()),
        precision=tuple((right_C / np.maximum(predicted_C, 1)).tolist()),
        recall=tuple(recall_C.tolist()),
        f1=tuple(f1_C.tolist()),
        count=tuple(count_C.tolist()),
    )


def bootstrap_interval(
    correct: Bool[np.ndarray, " n"], seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the accuracy (Efron & Tibshirani 1993, ch. 13).

    Drawing n of n examples with replacement makes the number of right ones binomial,
    so that is what is drawn. Of examples that are all right, so is every resample:
    there the interval is a point and tells nothing.
    """
    n = len(correct)
    if not n:
        raise DataError("there is no example to score. Give a set that is not empty.")
    draws = np.random.default_rng(seed).binomial(n, correct.mean(), RESAMPLES) / n
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(
    values: Sequence[int | float] | Real[np.ndarray, " n"], seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, as `bootstrap_interval` of a rate.

    Of values that are all equal the interval is a point and tells nothing.
    """
    n = len(values)
    if not n:
        raise DataError("there is no value to average. Give a list that is not empty.")
    above = np.asarray(values, np.float64) - values[0]  # equal ones become exact zeros
    rng, rows = np.random.default_rng(seed), max(1, VALUES // n)
    means = [
        above[rng.integers(n, size=(min(rows, RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = values[0] + np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
