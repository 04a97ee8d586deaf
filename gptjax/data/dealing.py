"""Rows of uneven length dealt to batches of a few lengths, epoch after epoch.

Rows are padded to the next of a few lengths, so that as many programs are compiled as
there are lengths. An epoch visits every row once: rows in an order drawn for the epoch
are dealt to batches by length; what is left over of one length goes to the next.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

SHORTEST = 16


def buckets(longest: int, fixed: bool = False) -> list[int]:
    """Lengths that rows are padded to: 16, 32, 64, ... and the longest.

    >>> buckets(120), buckets(120, fixed=True)
    ([16, 32, 64, 120], [120])
    """
    sizes = [] if fixed else [SHORTEST << n for n in range(32)]
    return [*(size for size in sizes if size < longest), longest]


@dataclasses.dataclass(frozen=True, eq=False)
class Deal:
    """Which rows go into which batch, a pure function of (lengths, seed, step)."""

    lengths: Sequence[int]  # of the rows, 1 to the last of `sizes`
    rows: int  # [B]
    sizes: Sequence[int]  # `buckets`
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches that visit every row once."""
        return -(-len(self.lengths) // self.rows)

    @property
    def shapes(self) -> list[int]:
        """Lengths that occur in an epoch, so many programs are compiled."""
        return sorted({size for size, _ in self.plan(0)})

    @functools.cached_property
    def bucket_of(self) -> np.ndarray:
        """Which of `sizes` each row needs."""
        return np.searchsorted(self.sizes, self.lengths)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as many as there are runs)
    def plan(self, epoch: int | None) -> list[tuple[int, np.ndarray]]:
        """(length, rows) of each batch of an epoch; None: in the order of the rows."""
        order = np.arange(len(self.lengths))
        rng = np.random.default_rng((self.seed, epoch or 0))
        if epoch is not None:
            rng.shuffle(order)
        batches, left = [], order[:0]
        for number, size in enumerate(self.sizes):
            left = np.concatenate([left, order[self.bucket_of[order] == number]])
            last = number == len(self.sizes) - 1
            while len(left) >= self.rows or (last and len(left)):
                batches.append((size, left[: self.rows]))
                left = left[self.rows :]
        if epoch is not None:
            batches = [batches[n] for n in rng.permutation(len(batches))]
        return batches

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """(length, rows) of the batch of one training step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.plan(epoch)[number]
