"""Metrics agree with scikit-learn and rouge_score; intervals are by bootstrap."""

import numpy as np
import pytest

from gptjax.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    exact_match,
    mean_ci,
    rouge_l,
    token_f1,
)

# (true, predicted) of 4 classes, and the values of scikit-learn 1.9.1 with
# zero_division=0: accuracy_score, f1_score(average="macro"), balanced_accuracy_score,
# then precision_recall_fscore_support(labels=range(4)).
SCIKIT_LEARN = [
    (
        ([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 2, 2, 0, 1]),
        (0.6, 0.5777777777777778, 0.5888888888888889),
        (0.6666666666666666, 0.3333333333333333, 0.75, 0),
        (0.6666666666666666, 0.5, 0.6, 0),
        (0.6666666666666666, 0.4, 0.6666666666666666, 0),
    ),
    (  # class 3 is predicted and does not occur; class 2 does neither
        ([0, 0, 0, 0, 1, 1], [0, 0, 3, 1, 1, 0]),
        (0.5, 0.35714285714285715, 0.5),
        (0.6666666666666666, 0.5, 0, 0),
        (0.5, 0.5, 0, 0),
        (0.5714285714285714, 0.5, 0, 0),
    ),
]
# Answer, reference, fmeasure of rougeL in rouge_score 0.1.2, F1 of words, exact match.
TEXTS = [
    ("the gunman kill police", "police killed the gunman", 1 / 2, 3 / 4, 0),
    ("The quick brown fox jumps", "a quick fox: it jumps over", 6 / 11, 6 / 11, 0),
    ("GPT_2 has 12 layers", "gpt 2 has 12 layers", 1, 1, 0),
    ("a a b", "a b b", 2 / 3, 2 / 3, 0),  # each word as often as both have it
    (" Jane Austen.\n", "Jane Austen.", 1, 1, 1),
    ("...", "words", 0, 0, 0),
    ("", " ", 0, 1, 1),
    ("Zürich, ÉTÉ", "zürich été", 1, 1, 0),  # rouge_score knows only ASCII
]


@pytest.mark.parametrize(("pair", "means", "precision", "recall", "f1"), SCIKIT_LEARN)
def test_classification_metrics_are_those_of_scikit_learn(pair, means, precision, recall, f1):
    true, predicted = np.array(pair, np.int8)

    confusion_CC = confusion_matrix(true, predicted, 200)  # has cells beyond int8
    found = classification_metrics(confusion_CC[:4, :4])

    assert found.count == tuple(np.bincount(true, minlength=4))
    for values, expected in zip(found[:6], (*means, precision, recall, f1), strict=True):
        assert values == pytest.approx(expected, abs=1e-15)


def test_interval_of_a_mean_is_that_of_drawing_values_with_replacement():
    rng = np.random.default_rng(1)

    for values in (rng.gamma(2, 20, 150), rng.random(150) < 0.8):
        drawn = values[rng.integers(150, size=(20_000, 150))].mean(axis=1)
        # The ends of 2,000 draws are known to 0.06 standard deviations of the mean.
        expected = np.percentile(drawn, [2.5, 97.5])
        np.testing.assert_allclose(mean_ci(values), expected, atol=0.2 * drawn.std())
    assert mean_ci([0.1] * 7) == (0.1, 0.1)


def test_overlap_scores_are_symmetric_and_those_of_their_authors():
    for first, second, rouge, f1, exact in TEXTS:
        for one, other in ((first, second), (second, first)):
            scores = rouge_l(one, other), token_f1(one, other), exact_match(one, other)
            assert scores == pytest.approx((rouge, f1, exact), abs=1e-15)
