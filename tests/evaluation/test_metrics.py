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


@pytest.mark.fast
def test_rouge_l_is_that_of_rouge_score():
    for answer, reference, expected in ROUGE_SCORE:
        assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-15)


@given(st.text("abc", max_size=8), st.text("abc", min_size=1, max_size=8))
def test_no_common_subsequence_is_longer_than_that_of_rouge_l(one, other):
    def subsequences(text):
        sizes = range(len(text) + 1)
        return {s for n in sizes for s in itertools.combinations(text, n)}

    longest = max(map(len, subsequences(one) & subsequences(other)))

    expected = 2 * longest / (len(one) + len(other))
    assert rouge_l(" ".join(one), " ".join(other)) == expected


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
