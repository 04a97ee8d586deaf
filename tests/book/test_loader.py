"""The order of the book's batches, with evaluations that take from the same numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.book import Loader, TorchGenerator, epochs
from gptjax.book.torch_random import dataloader_order
from gptjax.errors import ConfigError
from tests.torch_peer import import_torch

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda x: (max(x), min(x)))

# PyTorch 2.13's DataLoader of 18 items in batches of 2, in a loop that evaluates at
# steps 0, 5, 10, ... as chapter 5 does: the first three epochs.
CHAPTER_5 = [
    [0, 7, 14, 5, 6, 1, 17, 2, 11, 12, 9, 16, 13, 10, 3, 8, 15, 4],
    [10, 14, 8, 3, 16, 11, 13, 9, 1, 5, 17, 7, 0, 2, 15, 12, 6, 4],
    [11, 1, 0, 12, 16, 10, 9, 17, 4, 15, 3, 7, 5, 6, 14, 2, 13, 8],
]


def first(count, batches):
    return list(itertools.islice(batches, count))


@given(SIZES, st.booleans(), st.booleans())
def test_an_epoch_visits_each_item_once_but_for_a_batch_that_is_not_full(sizes, shuffle, drop_last):
    items, size = sizes

    (batches,) = first(1, epochs(items, size, 5, shuffle, drop_last))

    rest = [items % size] if items % size and not drop_last else []
    assert list(map(len, batches)) == [size] * (items // size) + rest
    seen = list(itertools.chain(*batches))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(items))
    assert shuffle or seen == list(range(len(seen)))


@given(SIZES, st.integers(0, 2**40))
def test_without_evaluations_the_epochs_are_those_of_a_loader_alone(sizes, seed):
    items, size = sizes

    for n, batches in enumerate(first(3, epochs(items, size, seed, drop_last=False))):
        assert list(itertools.chain(*batches)) == dataloader_order(seed, items, n)


@given(SIZES, st.integers(1, 12), st.integers(0, 2), st.booleans())
def test_evaluations_are_passes_that_begin_within_the_epochs(sizes, every, after, shuffle):
    items, size = sizes
    train, validation = Loader(items, size, shuffle), Loader(3, 2, shuffle=False)
    got = first(4, epochs(items, size, 9, shuffle, eval_every=every, eval_after=after))

    generator, step, due = TorchGenerator(9), 0, []
    for _ in range(4):
        due.append(train.start_epoch(generator))
        evaluations = after
        for _ in due[-1]:
            evaluations += step % every == 0
            step += 1
        for _ in range(evaluations):
            train.start_epoch(generator)
            validation.start_epoch(generator)

    assert got == due


def test_evaluations_change_later_epochs_and_not_the_first():
    alone, evaluated = epochs(18, 2), epochs(18, 2, eval_every=5)

    assert next(alone) == next(evaluated)
    assert next(alone) != next(evaluated)


def test_the_batches_of_chapter_5_have_pytorchs_order():
    got = first(3, epochs(18, 2, 123, eval_every=5))

    assert [list(itertools.chain(*batches)) for batches in got] == CHAPTER_5


def test_a_generator_goes_on_where_it_stands():
    generator, other = TorchGenerator(1), TorchGenerator(1)
    generator.uniform(100)

    passes = epochs(10, 3, generator)

    other.next_uint32(100)
    assert next(passes) == Loader(10, 3).start_epoch(other)
    generator.permutation(5)  # between the epochs, and the next one sees it
    other.next_uint32(4)
    assert next(passes) == Loader(10, 3).start_epoch(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epochs(0, 1), "loader.items=0 must be at least"),
        (lambda: epochs(4, 0), "loader.batch_size=0 must be at least"),
        (lambda: epochs(3, 4), "3 items are fewer than batch_size=4"),
        (lambda: epochs(4, 2, eval_every=-1), "eval_every=-1 and eval_after=0 must"),
        (lambda: epochs(4, 2, eval_after=-1), "eval_after=-1 must be at least 0"),
    ],
)
def test_a_loader_without_a_batch_is_an_error_at_once(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.fixture(scope="module")
def torch():
    return import_torch()


def torch_loader(torch, loader):
    return torch.utils.data.DataLoader(
        range(loader.items),
        loader.batch_size,
        shuffle=loader.shuffle,
        drop_last=loader.drop_last,
        collate_fn=list,
    )


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_passes_of_several_loaders_in_any_order_are_pytorchs(torch, seed):
    choices = np.random.default_rng(seed)
    ours = []
    for _ in range(3):
        items = int(choices.integers(1, 60))
        size = int(choices.integers(1, items + 1))
        ours.append(Loader(items, size, *map(bool, choices.integers(0, 2, 2))))
    theirs = [torch_loader(torch, loader) for loader in ours]
    generator = TorchGenerator(seed)
    torch.manual_seed(seed)

    for which in choices.integers(0, 3, 50):
        due = ours[which].start_epoch(generator)
        most = int(choices.integers(1, 6))  # some passes are left early
        assert first(most, theirs[which]) == due[:most]
        if choices.random() < 0.2:
            np.testing.assert_array_equal(generator.uniform(3), torch.rand(3))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("items", "size", "every", "after", "drop_last"),
    [(18, 2, 5, 0, True), (1045, 8, 50, 1, True), (23, 4, 1, 2, False), (9, 3, 0, 0, True)],
)
def test_a_training_loop_with_evaluations_visits_the_same_batches(
    torch, items, size, every, after, drop_last
):
    train = torch_loader(torch, Loader(items, size, drop_last=drop_last))
    validation = torch_loader(torch, Loader(7, 2, shuffle=False, drop_last=False))
    ours = epochs(*(items, size, 123, True, drop_last), eval_every=every, eval_after=after)
    torch.manual_seed(123)
    step = 0

    def evaluate():
        for loader in (train, validation):
            for n, _ in enumerate(loader):
                if n >= 2:
                    break

    for _ in range(4):
        visited = []
        for batch in train:
            visited.append(batch)
            if every and step % every == 0:
                evaluate()
            step += 1
        for _ in range(after):
            evaluate()
        assert next(ours) == visited
