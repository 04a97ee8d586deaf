"""Batches for classification: a pure function of (texts, seed, step)."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.dealing import BucketSampler


class ClassificationBatch(TypedDict):
    """Input of one training or evaluation step."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]  # tokens per row without padding
    labels: Int32[np.ndarray, " B"]
    loss_weights: Float32[np.ndarray, " B"]  # 0 for padding rows


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationBatches:
    """Length-bucketed batches of tokenized texts with labels."""

    token_ids: Sequence[Sequence[int]]  # per text; 1 to max(bucket_lengths) tokens
    labels: Sequence[int]
    rows: int  # batch size B
    bucket_lengths: Sequence[int]  # from `buckets`
    pad_id: int  # padding token
    seed: int = 0

    @functools.cached_property
    def sampler(self) -> BucketSampler:
        """Sampler that assigns rows to batches."""
        return BucketSampler(
            [len(row) for row in self.token_ids],
            self.rows,
            self.bucket_lengths,
            self.seed,
        )

    def batch_at(self, step: int) -> ClassificationBatch:
        """Returns the batch of a training step, counted from 0."""
        return self.make_batch(*self.sampler.batch_rows(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, ClassificationBatch]]:
        """Yields (row indices, batch); every row occurs once."""
        for length, row_indices in self.sampler.epoch_plan(None):
            yield row_indices, self.make_batch(length, row_indices)

    def make_batch(self, length: int, row_indices: np.ndarray) -> ClassificationBatch:
        """Returns the rows at these indices, padded to the length and batch size."""
        token_BT = np.full((self.rows, length), self.pad_id, np.int32)
        length_B = np.ones(self.rows, np.int32)
        class_B, weight_B = (
            np.zeros(self.rows, np.int32),
            np.zeros(self.rows, np.float32),
        )
        for n, row in enumerate(row_indices):
            ids = self.token_ids[row]
            token_BT[n, : len(ids)] = ids
            length_B[n], class_B[n], weight_B[n] = len(ids), self.labels[row], 1
        return ClassificationBatch(
            tokens=token_BT, lengths=length_B, labels=class_B, loss_weights=weight_B
        )
