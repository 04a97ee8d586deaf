"""Batches of labelled texts: a pure function of (rows, seed, step), in a few shapes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.dealing import Deal


class LabelledBatch(TypedDict):
    """What one step reads."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]  # real tokens of each row
    classes: Int32[np.ndarray, " B"]
    weights: Float32[np.ndarray, " B"]  # 0 for rows that only fill up the batch


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledBatches:
    """The batches of labelled rows."""

    ids: Sequence[Sequence[int]]  # tokens of each row, 1 to the last of `sizes`
    classes: Sequence[int]
    rows: int  # [B]
    sizes: Sequence[int]  # `buckets`
    fill: int  # token that fills up rows
    seed: int = 0

    @functools.cached_property
    def deal(self) -> Deal:
        """Which rows each batch has."""
        return Deal([len(row) for row in self.ids], self.rows, self.sizes, self.seed)

    def batch_at(self, step: int) -> LabelledBatch:
        """The batch of one training step, counted from 0."""
        return self.batch(*self.deal.at(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, LabelledBatch]]:
        """(numbers of the rows, batch) so that every row comes once."""
        for size, chosen in self.deal.plan(None):
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
