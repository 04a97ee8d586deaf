"""Length-bucketed batches as a pure function of (rows, seed, step).

Rows are padded to the next bucket length, so that one program is compiled per bucket.
Each epoch visits every row once, in a new random order: rows are batched by bucket,
and the rows left over in one bucket are added to the next. A short run pads more rows
to fewer lengths, since compilation takes longer than its steps.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.runtime.timing import log_progress

MIN_BUCKET = 16  # padded length
MIN_STEPS_PER_SHAPE = 30  # training steps that take about as long as one compilation


def buckets(max_length: int, single: bool = False) -> list[int]:
    """Returns the padded lengths: 16, 32, 64, ... and `max_length`.

    >>> buckets(120), buckets(120, single=True)
    ([16, 32, 64, 120], [120])
    """
    sizes = [] if single else [MIN_BUCKET << n for n in range(32)]
    return [*(size for size in sizes if size < max_length), max_length]


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedBatches(abc.ABC):
    """Length-bucketed batches; subclasses define the rows."""

    _: dataclasses.KW_ONLY
    rows: int  # [B] per batch
    bucket_lengths: Sequence[int]  # see `buckets`
    pad_id: int  # padding token
    seed: int = 0
    min_length: int = 0  # minimum length of rows in training batches

    @property
    @abc.abstractmethod
    def lengths(self) -> Sequence[int]:
        """Length of each row, from 1 to the largest bucket."""

    @abc.abstractmethod
    def make_batch(self, length: int, indices: Sequence[int] | np.ndarray) -> Any:
        """Returns the rows at these indices, padded to the length and batch size."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-len(self.lengths) // self.rows)

    @property
    def batch_shapes(self) -> list[int]:
        """Distinct row lengths [T] in an epoch; each is compiled once."""
        return sorted({max(size, self.min_length) for size, _ in self.epoch_plan(0)})

    def limit_shapes(self, steps: int) -> "BucketedBatches":
        """Pads to fewer lengths: at most one per `MIN_STEPS_PER_SHAPE` steps."""
        num_shapes = max(steps // MIN_STEPS_PER_SHAPE, 1)
        return dataclasses.replace(self, min_length=self.batch_shapes[-num_shapes:][0])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one instance per run)
    def epoch_plan(self, epoch: int | None) -> list[tuple[int, np.ndarray]]:
        """Returns (length, row indices) of each batch of an epoch; None: unshuffled."""
        order = np.arange(len(self.lengths))
        row_bucket = np.searchsorted(self.bucket_lengths, self.lengths)
        rng = np.random.default_rng((self.seed, epoch or 0))
        if epoch is not None:
            rng.shuffle(order)
        batches, remaining, last = [], order[:0], row_bucket.max(initial=0)
        for number, size in enumerate(self.bucket_lengths[: last + 1]):
            remaining = np.concatenate([remaining, order[row_bucket[order] == number]])
            while len(remaining) >= self.rows or (number == last and len(remaining)):
                batches.append((size, remaining[: self.rows]))
                remaining = remaining[self.rows :]
        if epoch is not None:
            batches = [batches[n] for n in rng.permutation(len(batches))]
        return batches

    def batch_at(self, step: int) -> Any:
        """Returns the batch of a training step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        length, indices = self.epoch_plan(epoch)[number]
        return self.make_batch(max(length, self.min_length), indices)

    def in_order(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields (row indices, batch); every row occurs once."""
        batches = self.epoch_plan(None)
        for length, indices in log_progress(batches, len(batches), "scoring", "batches"):
            yield indices, self.make_batch(length, indices)
