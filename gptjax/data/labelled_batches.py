"""Batches of labelled texts: a pure function of (rows, seed, step), in a few shapes.

Rows are padded to the next of a few lengths, so that as many programs are compiled as
there are lengths. An epoch visits every row once: rows in an order drawn for the epoch
are dealt to batches by length; what is left over of one length goes to the next.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, Int32

SHORTEST = 16


class LabelledBatch(TypedDict):
    """What one step reads."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]  # real tokens of each row
    classes: Int32[np.ndarray, " B"]
    weights: Float32[np.ndarray, " B"]  # 0 for rows that only fill up the batch


def buckets(longest: int, fixed: bool = False) -> list[int]:
    """Lengths that rows are padded to: 16, 32, 64, ... and the longest.

    >>> buckets(120), buckets(120, fixed=True)
    ([16, 32, 64, 120], [120])
    """
    sizes = [] if fixed else [SHORTEST << n for n in range(32)]
    return [*(size for size in sizes if size < longest), longest]


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledBatches:
    """The batches of labelled rows."""

    ids: Sequence[Sequence[int]]  # tokens of each row, 1 to the last of `sizes`
    classes: Sequence[int]
    rows: int  # [B]
    sizes: Sequence[int]  # `buckets`
    fill: int  # token that fills up rows
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches that visit every row once."""
        return -(-len(self.ids) // self.rows)

    @functools.cached_property
    def bucket_of(self) -> np.ndarray:
        """Which of `sizes` each row needs."""
        return np.searchsorted(self.sizes, [len(row) for row in self.ids])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as many as there are runs)
    def plan(self, epoch: int | None) -> list[tuple[int, np.ndarray]]:
        """(length, rows) of each batch of an epoch; None: in the order of the rows."""
        order = np.arange(len(self.ids))
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

    def batch_at(self, step: int) -> LabelledBatch:
        """The batch of one training step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.batch(*self.plan(epoch)[number])

    def in_order(self) -> Iterator[tuple[np.ndarray, LabelledBatch]]:
        """(numbers of the rows, batch) so that every row comes once."""
        for size, chosen in self.plan(None):
            yield chosen, self.batch(size, chosen)

    def batch(self, size: int, chosen: np.ndarray) -> LabelledBatch:
        """The chosen rows, filled up to `size` tokens and `self.rows` rows."""
        token_BT = np.full((self.rows, size), self.fill, np.int32)
        length_B = np.ones(self.rows, np.int32)
        class_B, weight_B = (
            np.zeros(self.rows, np.int32),
            np.zeros(self.rows, np.float32),
        )
        for n, row in enumerate(chosen):
            ids = self.ids[row]
            token_BT[n, : len(ids)] = ids
            length_B[n], class_B[n], weight_B[n] = len(ids), self.classes[row], 1
        return LabelledBatch(
            tokens=token_BT, lengths=length_B, classes=class_B, weights=weight_B
        )
