"""Batches of conversations: a pure function of (examples, seed, step).

padded  one conversation per row, length-bucketed, see `gptjax.data.bucketing`
packed  several per row, isolated by segment ids
book    the DataLoader and collate function of Raschka 2024, chapter 7: PyTorch's
        shuffling, each batch padded to its longest row
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.batches import Batch
from gptjax.data.dealing import BucketSampler, buckets
from gptjax.data.examples import Example
from gptjax.data.torch_order import dataloader_order
from gptjax.errors import DataError


def collate(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """Collates examples into a batch of rows of `length` positions.

    An example of n tokens takes n - 1 positions: its last token is only a target, its
    first only an input. Padding has weight 0.

    Args:
        rows: examples of each row, which must fit.
        length: [T] positions per row.
        pad_id: fills unused positions.
    """
    shape = len(rows), length
    batch = Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        loss_weights=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    for b, row in enumerate(rows):
        start = 0
        for segment_id, example in enumerate(row, 1):
            stop = start + len(example.ids) - 1
            batch["tokens"][b, start:stop] = example.ids[:-1]
            batch["targets"][b, start:stop] = example.ids[1:]
            batch["loss_weights"][b, start:stop] = example.loss_mask[1:]
            batch["segment_ids"][b, start:stop] = segment_id
            batch["positions"][b, start:stop] = np.arange(stop - start)
            start = stop
    return batch


class BucketedBatches(NamedTuple):
    """Length-bucketed batches with one example per row."""

    examples: Sequence[Example]
    sampler: BucketSampler
    pad_id: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return self.sampler.steps_per_epoch

    @property
    def batch_shapes(self) -> list[int]:
        """Row lengths that occur."""
        return self.sampler.batch_shapes

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a training step, counted from 0."""
        return self.make_batch(*self.sampler.batch_rows(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields (example indices, batch); every example occurs once."""
        for length, indices in self.sampler.epoch_plan(None):
            yield indices, self.make_batch(length, indices)

    def make_batch(self, length: int, indices: Iterable[Any]) -> Batch:
        """Returns the examples at these indices, with empty rows as padding."""
        rows = [[self.examples[n]] for n in indices]
        rows += [[]] * (self.sampler.rows - len(rows))
        return collate(rows, length, self.pad_id)


def make_bucketed_batches(
    examples: Sequence[Example], rows: int, context: int, pad_id: int, seed: int = 0
) -> BucketedBatches:
    """Creates `BucketedBatches`; each example must fit `context`."""
    lengths = [len(example.ids) - 1 for example in examples]
    return BucketedBatches(
        examples, BucketSampler(lengths, rows, buckets(context), seed), pad_id
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatches:
    """Packed batches with several examples per row, packed alike in every epoch."""

    examples: Sequence[Example]
    rows: int  # batch size B
    context: int  # [T]
    pad_id: int
    seed: int

    @functools.cached_property
    def bin_packing(self) -> list[list[int]]:
        """Example indices per row: best-fit decreasing bin packing."""
        bins: list[list[int]] = []
        bins_by_space: dict[int, list[int]] = {}  # positions left: bin indices
        lengths = [len(example.ids) - 1 for example in self.examples]
        for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            fitting_spaces = range(lengths[n], self.context + 1)
            space_left = next(
                (space for space in fitting_spaces if bins_by_space.get(space)), None
            )
            if space_left is None:
                bins.append([])
                space_left, bin_index = self.context, len(bins) - 1
            else:
                bin_index = bins_by_space[space_left].pop()
            bins[bin_index].append(n)
            bins_by_space.setdefault(space_left - lengths[n], []).append(bin_index)
        return bins

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-len(self.bin_packing) // self.rows)

    @property
    def batch_shapes(self) -> list[int]:
        """Row lengths that occur."""
        return [self.context]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one instance per run)
    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns the row order of an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(
            len(self.bin_packing)
        )

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a training step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        bin_indices = self.epoch_order(epoch)[number * self.rows :][: self.rows]
        rows = [
            [self.examples[n] for n in self.bin_packing[row]] for row in bin_indices
        ]
        rows += [[]] * (self.rows - len(rows))
        return collate(rows, self.context, self.pad_id)


@dataclasses.dataclass(frozen=True, eq=False)
class BookBatches:
    """Batches of the book's data loader."""

    examples: Sequence[Example]
    rows: int  # batch size B; an incomplete last batch is dropped
    pad_id: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return len(self.examples) // self.rows

    @property
    def batch_shapes(self) -> list[int]:
        """Row lengths that occur in the first epoch."""
        return sorted(
            {
                self.max_length(self.batch_indices(n))
                for n in range(self.steps_per_epoch)
            }
        )

    def batch_indices(self, step: int) -> list[int]:
        """Returns the example indices of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = dataloader_order(self.seed, len(self.examples), epoch)
        return order[number * self.rows :][: self.rows]

    def max_length(self, indices: Iterable[int]) -> int:
        """Returns the positions of the longest of these examples."""
        return max(len(self.examples[n].ids) - 1 for n in indices)

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a training step, counted from 0."""
        return self.make_batch(self.batch_indices(step))

    def make_batch(self, indices: Sequence[int]) -> Batch:
        """Returns the examples at these indices, padded to the longest of them."""
        rows = [[self.examples[n]] for n in indices]
        return collate(rows, self.max_length(indices), self.pad_id)


SFTBatches = BucketedBatches | PackedBatches | BookBatches


def make_sft_batches(
    batching: str,
    examples: Sequence[Example],
    *,
    rows: int,
    context: int,
    pad_id: int,
    seed: int,
) -> SFTBatches:
    """Creates the batches of a run; deterministic in its arguments.

    Args:
        batching: "auto" (padded), "padded", "packed" or "book".
        examples: training examples, at most `context` + 1 tokens each.
        rows: batch size B.
        context: [T] maximum positions per row.
        pad_id: fills unused positions.
        seed: for shuffling.

    Raises:
        DataError: `batching` is invalid for conversations, or there are fewer examples
            than one batch needs.
    """
    if batching == "packed":
        return PackedBatches(examples, rows, context, pad_id, seed)
    if batching == "book":
        if len(examples) < rows:
            raise DataError(
                f"{len(examples)} conversations do not fill one batch of {rows} rows, "
                "and data.batching=book drops incomplete batches. Decrease "
                "data.batch_size, or use data.batching=padded."
            )
        return BookBatches(examples, rows, pad_id, seed)
    if batching == "concat":
        raise DataError(
            "data.batching=concat allows attention across the documents of a row, "
            "which is not supported for conversations. Use packed or padded."
        )
    return make_bucketed_batches(examples, rows, context, pad_id, seed)
