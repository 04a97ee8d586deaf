"""Metrics agree with scikit-learn and rouge_score; intervals are by bootstrap."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    exact_match,
    lcs_length,
    mean_ci,
    rouge_l,
    token_f1,
)

# (true, predicted) of 4 classes, and what sklearn.metrics of scikit-learn 1.9.1 says:
# accuracy_score, f1_score(average="macro"), balanced_accuracy_score, then what
# precision_recall_fscore_support(labels=range(4)) says; all with zero_division=0.
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
# (answer, reference, what rouge_score 0.1.2 says: rougeL's fmeasure, no stemmer)
ROUGE_SCORE = [
    ("the gunman kill police", "police killed the gunman", 0.5),
    ("The quick brown fox jumps", "a quick fox: it jumps over", 0.5454545454545454),
    ("Jane Austen", "Jane Austen wrote 'Pride and Prejudice'.", 0.5),
    ("GPT_2 has 12 layers", "gpt 2 has 12 layers", 1.0),
    ("...", "words", 0.0),
    ("", "", 0.0),
]


@pytest.mark.fast
@pytest.mark.parametrize(("pair", "means", "precision", "recall", "f1"), SCIKIT_LEARN)
def test_classification_metrics_are_those_of_scikit_learn(pair, means, precision, recall, f1):
    true, predicted = map(np.array, pair)

    found = classification_metrics(confusion_matrix(true, predicted, 4))

    assert found[:3] == pytest.approx(means, abs=1e-15)
    assert found.precision == pytest.approx(precision, abs=1e-15)
    assert found.recall == pytest.approx(recall, abs=1e-15)
    assert found.f1 == pytest.approx(f1, abs=1e-15)
    assert found.count == tuple(np.bincount(true, minlength=4))


def test_confusion_matrix_counts_pairs_of_small_integers():
    true, predicted = np.array([[99, 99, 1], [99, 99, 98]], np.int8)

    matrix_CC = confusion_matrix(true, predicted, 100)

    assert (matrix_CC[99, 99], matrix_CC[1, 98], matrix_CC.sum()) == (2, 1, 3)


def test_interval_of_a_mean_is_that_of_drawing_values_with_replacement():
    rng = np.random.default_rng(1)

    for values in (rng.gamma(2, 20, 150), rng.random(150) < 0.8):
        drawn = values[rng.integers(150, size=(20_000, 150))].mean(axis=1)
        # The ends of 2,000 draws are known to 0.06 standard deviations of the mean.
        expected = np.percentile(drawn, [2.5, 97.5])
        np.testing.assert_allclose(mean_ci(values), expected, atol=0.2 * drawn.std())
    assert mean_ci([0.1] * 7) == (0.1, 0.1)


@pytest.mark.fast
def test_rouge_l_is_that_of_rouge_score():
    for answer, reference, expected in ROUGE_SCORE:
        assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-15)


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_no_common_subsequence_is_longer(one, other):
    def subsequences(text):
        sizes = range(len(text) + 1)
        return {s for n in sizes for s in itertools.combinations(text, n)}

    expected = max(map(len, subsequences(one) & subsequences(other)))

    assert lcs_length(one, other) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("the cat", "a cat", 1 / 2, 0),  # articles count
        ("a a b", "a b b", 2 / 3, 0),  # each word as often as both have it
        ("Zürich, ÉTÉ", "zürich été", 1, 0),
        (" Jane Austen.\n", "Jane Austen.", 1, 1),
        ("", " ", 1, 1),
        ("cat", "", 0, 0),
    ],
)
def test_token_f1_compares_bags_of_words_and_exact_match_whole_texts(answer, reference, f1, exact):
    for one, other in ((answer, reference), (reference, answer)):
        assert token_f1(one, other) == pytest.approx(f1, abs=1e-15)
        assert exact_match(one, other) == exact
