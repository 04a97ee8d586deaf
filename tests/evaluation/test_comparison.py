"""Confidence intervals for the difference of two models and of two configs."""

import numpy as np
import pytest
from scipy import stats

from gptjax.errors import DataError
from gptjax.evaluation.comparison import (
    NUM_BLOCKS,
    paired_interval,
    score_documents,
    sum_clusters,
    welch_interval,
)
from gptjax.evaluation.perplexity import token_losses
from tests.small_models import make_model


def test_of_equal_documents_it_is_the_paired_t_interval_and_of_seeds_that_of_welch():
    rng = np.random.default_rng(0)
    first, second = rng.normal(3, 1, 20), rng.normal(2.5, 2, 20)

    paired = paired_interval(50 * (second - first), np.full(20, 50))
    welch = welch_interval(first[:3].tolist(), second[:5].tolist())

    expected = stats.ttest_rel(second, first).confidence_interval()
    assert paired[1:] == pytest.approx(tuple(expected))
    expected = stats.ttest_ind(second[:5], first[:3], equal_var=False).confidence_interval()
    assert welch[1:] == pytest.approx(tuple(expected))
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) == (1, 1, 1)


@pytest.mark.parametrize("documents", [15, 60])
def test_its_interval_covers_the_true_difference_in_95_percent_of_samples(documents):
    """Of a population whose documents differ a lot in length and in difference."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(5, 1, 100_000)).round() + 1
    difference = size * (0.01 * np.log(size) + rng.normal(0, 0.05, len(size)))
    truth, covered, covered_as_tokens = difference.sum() / size.sum(), 0, 0

    for _ in range(1_000):
        drawn = rng.integers(len(size), size=documents)
        interval = paired_interval(difference[drawn], size[drawn])
        covered += interval.low <= truth <= interval.high
        # As if the tokens of a document were independent, with a deviation of 0.3 each.
        half_width = 1.96 * 0.3 / np.sqrt(size[drawn].sum())
        covered_as_tokens += abs(interval.difference - truth) <= half_width

    assert 930 <= covered <= 970
    assert covered_as_tokens < 900


def test_a_document_is_scored_by_itself_and_each_of_its_tokens_once():
    model = make_model(context_length=16)
    documents = ["one and two", "三", "a text of more than one window of sixteen tokens", "x"]

    losses = score_documents(model, documents)
    swapped = score_documents(model, documents[::-1])

    for number, text in enumerate(documents):
        nats = losses.nats[losses.document == number]
        assert len(nats) == losses.num_bytes[losses.document == number].sum() == len(text.encode())
        if len(nats) <= 16:  # the context length
            alone = token_losses(model, text)[1]
            np.testing.assert_allclose(nats, alone, rtol=1e-5)
            np.testing.assert_allclose(
                swapped.nats[swapped.document == 3 - number], alone, rtol=1e-5
            )


def test_few_documents_are_divided_into_blocks_of_equal_size_and_many_are_clusters():
    model = make_model(context_length=16)

    one = sum_clusters(score_documents(model, ["a text " * 40]), 1)
    many = sum_clusters(score_documents(model, [f"text {n}" for n in range(20)]), 20)

    assert (len(one.nats), set(one.tokens), one.tokens.sum()) == (NUM_BLOCKS, {7}, 280)
    assert many.tokens.tolist() == many.num_bytes.tolist() == [6] * 10 + [7] * 10
    with pytest.raises(DataError, match="--text"):
        sum_clusters(score_documents(model, ["a"]), 1)
