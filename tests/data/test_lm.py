"""A batch depends on nothing but the tokens, the seed and the step."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.lm import LMBatches, make_lm_batch, validation_batches
from gptjax.data.token_files import TokenDataset, open_shard
from gptjax.errors import DataError
from tests.data.tables import quick

EOT = 999


@pytest.fixture(scope="module")
def open_stream(tmp_path_factory):
    """A function that writes token ids to a file and opens it."""

    def open_tokens(ids):
        path = tmp_path_factory.mktemp("tokens") / "shard"
        np.array(ids, "<u2").tofile(path)
        return TokenDataset([open_shard(path, len(ids), np.dtype("<u2"))], 1000, EOT)

    return open_tokens


def counting(length):
    """A stream in which each token is its position: eot 1 2 3 ... eot."""
    return [EOT, *range(1, length - 1), EOT]


def batches_of(tokens, **options):
    default = {"rows": 4, "context": 5, "seed": 0, "isolate_documents": True}
    return LMBatches(tokens, **{**default, **options})


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@pytest.mark.fast
@quick
@given(st.integers(2, 60), st.integers(1, 9), st.integers(0, 5))
def test_rows_of_an_epoch_have_each_target_once_in_order_of_a_circular_stream(
    open_stream, length, context, seed
):
    length = max(length, context + 1)
    batches = batches_of(open_stream(counting(length)), rows=1, context=context, seed=seed)
    rows, circle = batches.rows_per_epoch, counting(length)[:-1]
    after = dict(zip(circle, circle[1:] + circle[:1], strict=True))

    for epoch in range(2):
        seen = []
        for step in range(epoch * rows, (epoch + 1) * rows):
            batch = batches.batch_at(step)
            tokens, targets = batch["tokens"][0].tolist(), batch["targets"][0].tolist()
            assert tokens[1:] == targets[:-1]
            assert [after[token] for token in tokens] == targets
            seen += targets
        assert len(set(seen)) == len(seen) == rows * context
        assert length - 1 - len(seen) < context  # less than a row is left out


@pytest.mark.fast
def test_batches_are_the_same_after_any_restart_and_on_any_number_of_hosts(open_stream):
    tokens = open_stream(counting(200))
    uninterrupted = [batches_of(tokens, rows=8).batch_at(step) for step in range(15)]

    for start in (0, 7, 15):
        assert_equal(list(batches_of(tokens, rows=8).iterate(start, 15)), uninterrupted[start:])
    parts = [
        batches_of(tokens, rows=8, local_rows=rows.tolist()).batch_at(14)
        for rows in np.split(np.arange(8), 4)
    ]
    assert_equal(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), uninterrupted[14])


def test_seeds_and_epochs_differ_in_order_and_offset(open_stream):
    tokens, orders = open_stream(counting(100)), set()
    for seed in (0, 2**40):
        batches = batches_of(tokens, rows=19, seed=seed)  # an epoch
        orders |= {tuple(batches.batch_at(step)["targets"][:, 0].tolist()) for step in range(2)}

    assert (batches.steps_per_epoch, len(orders)) == (1, 4)
    assert len({frozenset(order) for order in orders}) >= 3  # offsets


def test_documents_of_a_row_are_numbered_and_their_tokens_counted():
    row_BL = np.array([[1, 2, EOT, EOT, 3, EOT], [EOT, 4, 5, 6, EOT, 7]], np.int32)

    isolated, joined = (make_lm_batch(row_BL, eot) for eot in (EOT, None))

    assert isolated["segment_ids"].tolist() == [[1, 1, 2, 3, 3], [1, 1, 1, 1, 2]]
    assert isolated["positions"].tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 0]]
    assert joined["segment_ids"].tolist() == [[1] * 5] * 2
    assert joined["positions"].tolist() == [[0, 1, 2, 3, 4]] * 2


@quick
@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_validation_scores_every_token_but_the_first_once(
    open_stream, length, context, rows, isolate
):
    tokens = open_stream(counting(length))
    options = {"rows": rows, "context": context, "isolate_documents": isolate}

    batches = list(validation_batches(tokens, **options))
    some = list(validation_batches(tokens, **options, max_batches=3))

    names = ("tokens", "targets", "loss_weights")
    token, target, weight = (np.concatenate([b[name].ravel() for b in batches]) for name in names)
    scored = list(zip(token[weight > 0].tolist(), target[weight > 0].tolist(), strict=True))
    assert scored == list(itertools.pairwise(counting(length)))
    assert {batch["tokens"].shape for batch in batches} == {(rows, context)}
    count = min(3, len(batches))  # from all over the text
    assert_equal(some, [batches[i * len(batches) // count] for i in range(count)])


def test_too_few_and_invalid_tokens_are_rejected(open_stream):
    assert batches_of(open_stream(counting(5)), context=4).rows_per_epoch == 1
    with pytest.raises(DataError, match=r"5 tokens .*model\.context_length=5"):
        batches_of(open_stream(counting(5)))
    ids = counting(50)
    ids[30] = 1500
    with pytest.raises(DataError, match="token 1500 at offset 30"):  # in the prefetching thread
        list(batches_of(open_stream(ids)).iterate(0, 40))
