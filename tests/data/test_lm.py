"""A batch depends on nothing but the tokens, the seed and the step."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.lm import LMBatches, make_batches, make_lm_batch, validation_batches
from gptjax.data.token_files import TokenDataset, TokenShard, open_shards
from gptjax.errors import DataError

EOT = 999


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A function that puts token ids on disk, in two shards."""
    folders = (tmp_path_factory.mktemp("tokens") for _ in iter(int, 1))

    def opened(ids: list[int]) -> TokenDataset:
        folder: Path = next(folders)
        shards = []
        for name, part in (("a", ids[: len(ids) // 2]), ("b", ids[len(ids) // 2 :])):
            np.array(part, "<u2").tofile(folder / name)
            shards.append(TokenShard(folder / name, len(part), np.dtype("<u2")))
        return open_shards(shards, 1000, EOT)

    return opened


def counting(length: int) -> list[int]:
    """A stream in which each token tells its place: eot 1 2 3 ... eot."""
    return [EOT, *range(1, length - 1), EOT]


def batches_of(tokens: TokenDataset, **options: object) -> LMBatches:
    """With small values."""
    default = {"rows": 4, "context": 5, "seed": 0, "isolate_documents": True}
    return make_batches(tokens, **{**default, **options})


def same(a: object, b: object) -> bool:
    """Whether two batches are equal in every element and type."""
    return all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype
        for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    )


@pytest.mark.fast
@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(2, 60), st.integers(1, 9), st.integers(0, 5))
def test_each_token_is_a_target_at_most_once_an_epoch(stream, length, context, seed):
    if length < context + 1:
        return
    tokens = stream(counting(length))
    batches = batches_of(tokens, rows=1, context=context, seed=seed)
    each = batches.rows_per_epoch

    for epoch in range(3):
        found = [batches.batch_at(epoch * each + i) for i in range(each)]
        targets = np.concatenate([batch["targets"][0] for batch in found])
        assert len(targets) == len(set(targets.tolist())) == each * context
        # What is left over is less than a row.
        assert length - 1 - len(targets) < context


@pytest.mark.fast
def test_rows_are_read_in_a_circle(stream):
    tokens = stream(counting(23))
    batches = batches_of(tokens, rows=1, isolate_documents=False)
    after = {**{i: i + 1 for i in range(1, 21)}, 21: EOT, EOT: 1}

    for step in range(50):
        batch = batches.batch_at(step)
        row = [*batch["tokens"][0].tolist(), int(batch["targets"][0, -1])]
        assert batch["targets"][0].tolist() == row[1:]
        assert all(after[a] == b for a, b in itertools.pairwise(row))


@pytest.mark.fast
def test_batches_are_the_same_after_any_restart_and_read_ahead(stream):
    tokens = stream(counting(200))
    unbroken = [batches_of(tokens).batch_at(step) for step in range(25)]

    for start in (0, 7, 24, 25):
        resumed = list(batches_of(tokens).iterate(start, 25))
        assert len(resumed) == 25 - start
        assert all(map(same, resumed, unbroken[start:]))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_share_the_rows_of_one_batch(stream, hosts):
    tokens = stream(counting(100))
    whole = batches_of(tokens, rows=8)

    for step in (0, 3, 50):
        parts = [
            batches_of(tokens, rows=8, local_rows=here.tolist()).batch_at(step)
            for here in np.split(np.arange(8), hosts)
        ]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        assert same(joined, whole.batch_at(step))


def test_seeds_and_epochs_differ(stream):
    tokens = stream(counting(100))

    def epoch(number: int, seed: int) -> list[list[int]]:
        batches = batches_of(tokens, rows=1, seed=seed)
        steps = range(number * batches.rows_per_epoch, (number + 1) * 19)
        return [batches.batch_at(step)["targets"][0].tolist() for step in steps]

    orders = [epoch(number, seed) for seed in (0, 1, 2, 2**40) for number in range(3)]

    assert len(orders[0]) == 19
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    # Not only the order: the rows of another epoch or seed start at other places.
    starts = {frozenset(row[0] for row in order) for order in orders[:3]}
    assert len(starts) == 3


def test_steps_per_epoch_is_how_often_the_text_is_seen(stream):
    batches = batches_of(stream(counting(101)), rows=8, context=5)

    assert batches.rows_per_epoch == 20
    assert batches.steps_per_epoch == 2.5


def brute_force(row: list[int], eot: int | None) -> tuple[list[int], list[int]]:
    """Segments and positions by counting."""
    segments, positions = [], []
    for i, token in enumerate(row):
        starts = i == 0 or token == eot
        segments.append(1 if i == 0 else segments[-1] + starts)
        positions.append(0 if starts else positions[-1] + 1)
    return segments, positions


@pytest.mark.fast
@settings(deadline=None, derandomize=True)
@given(
    st.integers(2, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([EOT, 1, 2]), min_size=n, max_size=n), min_size=1
        )
    ),
    st.sampled_from([EOT, None]),
)
def test_documents_of_a_row_are_numbered_and_counted_from_0(rows, eot):
    batch = make_lm_batch(np.array(rows, np.int32), eot)

    for i, row in enumerate(rows):
        segments, positions = brute_force(row[:-1], eot)
        assert batch["tokens"][i].tolist() == row[:-1]
        assert batch["targets"][i].tolist() == row[1:]
        assert batch["segment_ids"][i].tolist() == segments
        assert batch["positions"][i].tolist() == positions
    assert (batch["loss_weights"] == 1).all()
    kinds = {name: array.dtype.name for name, array in batch.items()}
    assert kinds.pop("loss_weights") == "float32"
    assert set(kinds.values()) == {"int32"}


@pytest.mark.fast
@settings(deadline=None, derandomize=True)
@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_validation_scores_every_token_but_the_first_once(stream, length, context, rows, packed):
    tokens = stream(counting(length))

    found = list(validation_batches(tokens, rows=rows, context=context, isolate_documents=packed))

    scored = [
        (int(token), int(target))
        for batch in found
        for token, target, weight in zip(
            *(batch[name].ravel() for name in ("tokens", "targets", "loss_weights")), strict=True
        )
        if weight
    ]
    assert scored == list(itertools.pairwise(counting(length)))
    assert {batch["tokens"].shape for batch in found} == {(rows, context)}


def test_a_limit_takes_whole_batches_from_all_over_the_text(stream):
    tokens = stream(counting(103))
    options = {"rows": 2, "context": 5, "isolate_documents": True}
    everything = list(validation_batches(tokens, **options))

    some = list(validation_batches(tokens, **options, max_batches=3))

    assert len(everything) == 11
    assert all(map(same, some, [everything[i] for i in (0, 3, 7)]))
    assert len(list(validation_batches(tokens, **options, max_batches=99))) == 11


def test_a_text_shorter_than_one_row_is_refused(stream):
    tokens = stream(counting(5))

    assert batches_of(tokens, context=4).rows_per_epoch == 1
    message = "5 tokens are too few for model.context_length=5, which needs 6"
    with pytest.raises(DataError, match=message):
        batches_of(tokens, context=5)


def test_reading_ahead_passes_errors_on_and_ends_its_threads(stream):
    ids = counting(50)
    ids[30] = 1500
    before = threading.active_count()

    with pytest.raises(DataError, match="token 1500 at offset 5 is out of range"):
        list(batches_of(stream(ids)).iterate(0, 40))
    ahead = batches_of(stream(counting(50))).iterate(0, 1000)
    next(ahead)
    ahead.close()

    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon is False:
            thread.join(timeout=10)
    assert threading.active_count() <= before + 1
