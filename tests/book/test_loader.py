"""Batch order of training and evaluation, against PyTorch where it is installed."""

import functools
import itertools

import pytest

from gptjax.book import Loader, TorchGenerator, epochs
from gptjax.book.schedule import plan_batch_schedule
from gptjax.config import TrainConfig
from tests.torch_peer import import_torch

# PyTorch 2.13's DataLoader of 18 items in batches of 2, in a loop that evaluates at
# steps 0, 5, 10, ... as chapter 5 does: the first three epochs.
CHAPTER_5 = [
    [0, 7, 14, 5, 6, 1, 17, 2, 11, 12, 9, 16, 13, 10, 3, 8, 15, 4],
    [10, 14, 8, 3, 16, 11, 13, 9, 1, 5, 17, 7, 0, 2, 15, 12, 6, 4],
    [11, 1, 0, 12, 16, 10, 9, 17, 4, 15, 3, 7, 5, 6, 14, 2, 13, 8],
]
# Training and validation rows, batch size, steps between evaluations, batches of one,
# evaluations at the end of an epoch: chapters 5, 6 and 7.
CHAPTERS = [(18, 2, 2, 5, 5, 0), (1045, 149, 8, 50, 5, 1), (935, 55, 8, 5, 5, 0)]


def plan(train, validation, size, every, count, after):
    loaders = Loader(train, size), Loader(validation, size, shuffle=False, drop_last=False)
    config = TrainConfig(steps=300, eval_every=every, eval_batches=count)
    return plan_batch_schedule(*loaders, TorchGenerator(123), config, after)


def test_the_batches_of_chapter_5_have_the_order_of_pytorch():
    order = itertools.islice(epochs(18, 2, 123, eval_every=5), 3)

    assert [list(itertools.chain(*batches)) for batches in order] == CHAPTER_5
    assert next(epochs(5, 2, shuffle=False)) == [[0, 1], [2, 3]]
    assert next(epochs(5, 2, shuffle=False, drop_last=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_schedule_is_that_of_a_loop_in_pytorch(chapter):
    torch = import_torch()
    train, validation, size, every, count, after = chapter
    schedule = plan(*chapter)
    loader = functools.partial(torch.utils.data.DataLoader, batch_size=size, collate_fn=list)
    loaders = loader(range(train), shuffle=True, drop_last=True), loader(range(validation))
    torch.manual_seed(123)
    step = 0
    while step < 300:
        for batch in loaders[0]:
            assert step >= 300 or schedule.train_batches[step] == batch
            if step % every == 0:
                evaluated = [list(itertools.islice(loader, count)) for loader in loaders]
                expected = [schedule.eval_batches.get(step + 1), schedule.val_batches[:count]]
                assert step >= 300 or evaluated == expected
            step += 1
        for _ in range(after):
            for loader in loaders:
                next(iter(loader))
