"""Metrics agree with scikit-learn, rouge_score and scipy."""

import numpy as np
import pytest
import scipy.stats

from gptjax.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    exact_match,
    mean_ci,
    proportion_ci,
    rouge_l,
    token_f1,
)

# Answer, reference, fmeasure of rougeL in rouge_score 0.1.2, F1 of words, exact match.
TEXTS = [
    ("the gunman kill police", "police killed the gunman", 1 / 2, 3 / 4, 0),
    ("The quick brown fox jumps", "a quick fox: it jumps over", 6 / 11, 6 / 11, 0),
    ("GPT_2 has 12 layers", "gpt 2 has 12 layers", 1, 1, 0),
    ("a a b", "a b b", 2 / 3, 2 / 3, 0),  # each word as often as both have it
    (" Jane Austen.\n", "Jane Austen.", 1, 1, 1),
    ("", " ", 0, 1, 1),
    ("Zürich, ÉTÉ", "zürich été", 1, 1, 0),  # rouge_score knows only ASCII
]


def test_classification_metrics_are_those_of_scikit_learn():
    """Class 3 is predicted but does not occur; class 2 neither.

    Values of scikit-learn 1.9.1 with zero_division=0: accuracy_score, f1_score with
    average="macro", balanced_accuracy_score, precision_recall_fscore_support.
    """
    true, predicted = np.int8([0, 0, 0, 0, 1, 1]), np.int8([0, 0, 3, 1, 1, 0])
    expected = [0.5, 0.35714285714285715, 0.5]
    expected += [(2 / 3, 0.5, 0, 0), (0.5, 0.5, 0, 0), (4 / 7, 0.5, 0, 0), (4, 2, 0, 0)]

    confusion_CC = confusion_matrix(true, predicted, 200)  # has cells beyond int8

    for values, wanted in zip(classification_metrics(confusion_CC[:4, :4]), expected, strict=True):
        assert values == pytest.approx(wanted, abs=1e-15)


def test_interval_of_a_mean_is_that_of_drawing_values_with_replacement():
    rng = np.random.default_rng(1)

    for values in (rng.gamma(2, 20, 150), rng.random(150) < 0.8):
        drawn = values[rng.integers(150, size=(20_000, 150))].mean(axis=1)
        # The ends of 2,000 draws are known to 0.06 standard deviations of the mean.
        expected = np.percentile(drawn, [2.5, 97.5])
        np.testing.assert_allclose(mean_ci(values), expected, atol=0.2 * drawn.std())
    assert mean_ci([0.1] * 7) == (0.1, 0.1)


def test_interval_of_a_proportion_is_that_of_scipy():
    for successes, trials in ((0, 1), (3, 7), (60, 60), (999, 1000)):
        expected = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert proportion_ci(successes, trials) == pytest.approx(tuple(expected))


def test_overlap_scores_are_symmetric_and_those_of_their_authors():
    for first, second, rouge, f1, exact in TEXTS:
        for one, other in ((first, second), (second, first)):
            scores = rouge_l(one, other), token_f1(one, other), exact_match(one, other)
            assert scores == pytest.approx((rouge, f1, exact), abs=1e-15)
