"""Rates of a classifier, and how sure they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import DataError
from gptjax.evaluation import metrics as module
from gptjax.evaluation.metrics import accuracy_ci, classification_metrics, confusion_matrix, mean_ci

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
    (([1, 1, 2, 2], [0, 0, 0, 0]), (0, 0, 0), (0,) * 4, (0,) * 4, (0,) * 4),
]
pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1)


@pytest.mark.fast
@pytest.mark.parametrize(("pair", "means", "precision", "recall", "f1"), SCIKIT_LEARN)
def test_rates_are_those_of_scikit_learn(pair, means, precision, recall, f1):
    true, predicted = map(np.array, pair)

    found = classification_metrics(confusion_matrix(true, predicted, 4))

    assert found[:3] == pytest.approx(means, abs=1e-15)
    assert found.precision == pytest.approx(precision, abs=1e-15)
    assert found.recall == pytest.approx(recall, abs=1e-15)
    assert found.f1 == pytest.approx(f1, abs=1e-15)
    assert found.count == tuple(np.bincount(true, minlength=4))


@given(pairs)
def test_each_cell_counts_the_examples_of_its_pair_of_classes(found):
    true, predicted = map(np.array, zip(*found, strict=True))

    matrix_CC = confusion_matrix(true, predicted, 5)

    for row in range(5):
        for column in range(5):
            assert matrix_CC[row, column] == found.count((row, column))


@given(pairs, st.permutations(range(5)))
def test_means_do_not_depend_on_how_classes_are_numbered(found, order):
    true, predicted = map(np.array, zip(*found, strict=True))
    renumber = np.array(order)

    one = classification_metrics(confusion_matrix(true, predicted, 5))
    other = classification_metrics(confusion_matrix(renumber[true], renumber[predicted], 5))

    assert other[:3] == pytest.approx(one[:3], abs=1e-12)
    assert [other.f1[n] for n in order] == list(one.f1)


@given(pairs)
def test_swapping_truth_and_prediction_swaps_precision_and_recall(found):
    true, predicted = map(np.array, zip(*found, strict=True))

    one = classification_metrics(confusion_matrix(true, predicted, 5))
    other = classification_metrics(confusion_matrix(predicted, true, 5))

    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert (one.f1, one.macro_f1) == (other.f1, other.macro_f1)


def test_small_integers_do_not_overflow():
    true = np.full(3, 99, np.int8)

    assert confusion_matrix(true, true, 100)[99, 99] == 3


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1), st.integers(0, 99))
def test_the_interval_holds_the_accuracy_and_repeats_by_its_seed(right, seed):
    correct = np.array(right)

    low, high = accuracy_ci(correct, seed)

    assert 0 <= low <= correct.mean() <= high <= 1
    assert accuracy_ci(correct, seed) == (low, high)


def test_the_interval_is_that_of_drawing_examples_with_replacement():
    rng = np.random.default_rng(1)
    correct = rng.random(150) < 0.8
    drawn = correct[rng.integers(150, size=(20_000, 150))].mean(axis=1)

    found = accuracy_ci(correct)

    # One example is 0.0067; quantiles of 2,000 draws differ by less than two of them.
    np.testing.assert_allclose(found, np.percentile(drawn, [2.5, 97.5]), atol=0.0134)


def test_nineteen_of_twenty_intervals_hold_the_true_accuracy():
    rng = np.random.default_rng(2)

    intervals = [accuracy_ci(rng.random(400) < 0.8, seed) for seed in range(500)]

    held = np.mean([low <= 0.8 <= high for low, high in intervals])
    assert 0.92 < held < 0.98  # three standard deviations of 500 trials


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.integers(0, 99))
def test_the_interval_of_a_mean_holds_it_and_repeats_by_its_seed(values, seed):
    low, high = mean_ci(values, seed)

    slack = 1e-9  # sums in another order
    assert min(values) - slack <= low <= np.mean(values) + slack
    assert np.mean(values) - slack <= high <= max(values) + slack
    assert mean_ci(np.array(values), seed) == (low, high)


@given(st.floats(-1e3, 1e3), st.integers(1, 50))
def test_the_interval_of_equal_values_is_a_point(value, count):
    assert mean_ci([value] * count) == (value, value)


def test_the_interval_of_a_mean_is_that_of_drawing_values():
    rng = np.random.default_rng(1)
    values = rng.gamma(2, 20, 150)
    drawn = values[rng.integers(150, size=(20_000, 150))].mean(axis=1)

    found = mean_ci(values)

    # The ends of 2,000 draws are known to 0.06 standard deviations of the mean.
    np.testing.assert_allclose(found, np.percentile(drawn, [2.5, 97.5]), atol=0.2 * drawn.std())


@pytest.mark.parametrize("values", [1, 40, 1_000])
def test_the_interval_of_a_mean_does_not_depend_on_how_much_is_drawn_at_once(values, monkeypatch):
    grades = [0, 50, 70, 70, 85, 100]
    expected = mean_ci(grades)

    monkeypatch.setattr(module, "MAX_VALUES_PER_DRAW", values)

    assert mean_ci(grades) == expected


@pytest.mark.parametrize("wrong", [[0, 3], [-1, 0]])
def test_a_class_that_does_not_exist_is_refused(wrong):
    right = np.array([0, 1])

    for pair in ((np.array(wrong), right), (right, np.array(wrong))):
        with pytest.raises(DataError, match=r"-?\d to \d, .*3 classes are 0 to 2"):
            confusion_matrix(*pair, 3)


def test_nothing_has_no_score():
    none = np.zeros(0, int)

    with pytest.raises(DataError, match="no example to score"):
        classification_metrics(confusion_matrix(none, none, 2))
    with pytest.raises(DataError, match="no example to score"):
        accuracy_ci(none == 0)
    with pytest.raises(DataError, match="no value to average"):
        mean_ci([])
