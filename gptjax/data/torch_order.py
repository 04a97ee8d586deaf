"""The order in which PyTorch's DataLoader visits rows, without PyTorch.

`torch.manual_seed(seed)` starts a Mersenne Twister. Each `iter(loader)` draws a base
seed from it and, if it shuffles, a seed for a twister of its own, which makes a
Fisher-Yates permutation (torch.utils.data, aten's randperm on the CPU).
"""

import functools
from collections.abc import Iterable

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, rows: int, epoch: int) -> list[int]:
    """The rows that a shuffling loader visits in its `epoch`-th pass, from 0.

    Nothing else has drawn from the generator since `torch.manual_seed(seed)`.

    >>> epoch_order(123, 5, 0)
    [3, 1, 0, 2, 4]
    """
    drawn = numbers(seed, 4 * (epoch + 1))[-2:]
    return permutation((drawn[0] << 32 | drawn[1]) & (2**63 - 1), rows)


def numbers(seed: int, count: int) -> list[int]:
    """The first 32-bit numbers of the twister with this seed."""
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    return generator.randint(0, 1 << 32, count, np.uint32).tolist()


def permutation(seed: int, rows: int) -> list[int]:
    """PyTorch's randperm of a generator with this seed."""
    return shuffled(rows, numbers(seed, max(rows - 1, 0)))


def shuffled(rows: int, drawn: Iterable[int]) -> list[int]:
    """The permutation that a generator's next rows - 1 numbers make."""
    order = list(range(rows))
    for n, number in enumerate(drawn):
        other = n + number % (rows - n)
        order[n], order[other] = order[other], order[n]
    return order
