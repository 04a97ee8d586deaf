"""Shuffling order of PyTorch's DataLoader, without PyTorch.

`torch.manual_seed(seed)` seeds a Mersenne Twister. Each `iter(loader)` draws a base
seed from it and, if it shuffles, the seed of a second twister, which generates a
Fisher-Yates permutation (torch.utils.data and aten's randperm on CPU).
"""

import functools
from collections.abc import Iterable

import numpy as np


@functools.lru_cache(maxsize=4)
def dataloader_order(seed: int, rows: int, epoch: int) -> list[int]:
    """Returns the row order of a shuffling DataLoader in an epoch, counted from 0.

    Assumes no other draws from the generator since `torch.manual_seed(seed)`.

    >>> dataloader_order(123, 5, 0)
    [3, 1, 0, 2, 4]
    """
    draws = mt19937_uint32(seed, 4 * (epoch + 1))[-2:]
    return torch_randperm((draws[0] << 32 | draws[1]) & (2**63 - 1), rows)


def mt19937_uint32(seed: int, count: int) -> list[int]:
    """Returns the first 32-bit outputs of a Mersenne Twister with this seed."""
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    return generator.randint(0, 1 << 32, count, np.uint32).tolist()


def torch_randperm(seed: int, rows: int) -> list[int]:
    """Returns `torch.randperm(rows)` of a generator with this seed."""
    return fisher_yates_shuffle(rows, mt19937_uint32(seed, max(rows - 1, 0)))


def fisher_yates_shuffle(rows: int, draws: Iterable[int]) -> list[int]:
    """Returns the Fisher-Yates permutation of `rows` - 1 random numbers."""
    order = list(range(rows))
    for n, number in enumerate(draws):
        other = n + number % (rows - n)
        order[n], order[other] = order[other], order[n]
    return order
