"""Batches of conversations, a pure function of (examples, seed, step).

padded  one conversation a row, rows of a few lengths, see `gptjax.data.dealing`
packed  several a row, which see nothing of each other
book    as the DataLoader and the collate function of Raschka 2024, chapter 7: PyTorch's
        own order, and every batch as long as its longest row
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.batches import Batch
from gptjax.data.dealing import Deal, buckets
from gptjax.data.examples import Example
from gptjax.data.torch_order import epoch_order
from gptjax.errors import DataError


def filled(rows: Sequence[Sequence[Example]], size: int, fill: int) -> Batch:
    """A batch of rows of `size` positions, each with some examples.

    An example of n tokens takes n - 1 positions: all but its last are read, all but
    its first are predicted. What no example takes has weight 0.

    Args:
        rows: the examples of each row.
        size: [T] positions of a row, enough for each.
        fill: token that fills up rows.
    """
    shape = len(rows), size
    batch = Batch(
        tokens=np.full(shape, fill, np.int32),
        targets=np.full(shape, fill, np.int32),
        weights=np.zeros(shape, np.float32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            stop = start + len(example.ids) - 1
            batch["tokens"][b, start:stop] = example.ids[:-1]
            batch["targets"][b, start:stop] = example.ids[1:]
            batch["weights"][b, start:stop] = example.learned[1:]
            batch["segments"][b, start:stop] = number
            batch["positions"][b, start:stop] = np.arange(stop - start)
            start = stop
    return batch


class Padded(NamedTuple):
    """One example a row."""

    examples: Sequence[Example]
    deal: Deal
    fill: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass through the examples."""
        return self.deal.steps_per_epoch

    @property
    def shapes(self) -> list[int]:
        """Lengths of rows that occur."""
        return self.deal.shapes

    def batch_at(self, step: int) -> Batch:
        """The batch of one training step, counted from 0."""
        return self.batch(*self.deal.at(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """(numbers of the examples, batch) so that each comes once."""
        for size, chosen in self.deal.plan(None):
            yield chosen, self.batch(size, chosen)

    def batch(self, size: int, chosen: Iterable[Any]) -> Batch:
        """The chosen examples, and empty rows up to the size of a batch."""
        rows = [[self.examples[n]] for n in chosen]
        rows += [[]] * (self.deal.rows - len(rows))
        return filled(rows, size, self.fill)


def padded(
    examples: Sequence[Example], rows: int, context: int, fill: int, seed: int = 0
) -> Padded:
    """One example a row; the examples fit `context`."""
    lengths = [len(example.ids) - 1 for example in examples]
    return Padded(examples, Deal(lengths, rows, buckets(context), seed), fill)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """As many examples a row as fit, the same ones in every epoch."""

    examples: Sequence[Example]
    rows: int  # [B]
    context: int  # [T]
    fill: int
    seed: int

    @functools.cached_property
    def bins(self) -> list[list[int]]:
        """The examples of each row: the longest first, each where it fits best."""
        bins: list[list[int]] = []
        free: dict[int, list[int]] = {}  # positions left: bins
        lengths = [len(example.ids) - 1 for example in self.examples]
        for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            room = range(lengths[n], self.context + 1)
            left = next((space for space in room if free.get(space)), None)
            if left is None:
                bins.append([])
                left, number = self.context, len(bins) - 1
            else:
                number = free[left].pop()
            bins[number].append(n)
            free.setdefault(left - lengths[n], []).append(number)
        return bins

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass through the examples."""
        return -(-len(self.bins) // self.rows)

    @property
    def shapes(self) -> list[int]:
        """Lengths of rows that occur."""
        return [self.context]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as many as there are runs)
    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.bins))

    def batch_at(self, step: int) -> Batch:
        """The batch of one training step, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        chosen = self.order(epoch)[number * self.rows :][: self.rows]
        rows = [[self.examples[n] for n in self.bins[row]] for row in chosen]
        rows += [[]] * (self.rows - len(rows))
        return filled(rows, self.context, self.fill)


@dataclasses.dataclass(frozen=True, eq=False)
class Book:
    """The batches of the book's data loader."""

    examples: Sequence[Example]
    rows: int  # [B]; what is left over of an epoch is dropped
    fill: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass through the examples."""
        return len(self.examples) // self.rows

    @property
    def shapes(self) -> list[int]:
        """Lengths of rows that occur in the first epoch."""
        return sorted({self.size(self.chosen(n)) for n in range(self.steps_per_epoch)})

    def chosen(self, step: int) -> list[int]:
        """The examples of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, len(self.examples), epoch)
        return order[number * self.rows :][: self.rows]

    def size(self, chosen: Iterable[int]) -> int:
        """Positions that the longest of the examples takes."""
        return max(len(self.examples[n].ids) - 1 for n in chosen)

    def batch_at(self, step: int) -> Batch:
        """The batch of one training step, counted from 0."""
        return self.batch(self.chosen(step))

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The chosen examples, as long as the longest of them."""
        rows = [[self.examples[n]] for n in chosen]
        return filled(rows, self.size(chosen), self.fill)


ExampleBatches = Padded | Packed | Book


def example_batches(
    batching: str,
    examples: Sequence[Example],
    *,
    rows: int,
    context: int,
    fill: int,
    seed: int,
) -> ExampleBatches:
    """The batches of a run: same arguments, same batches.

    Args:
        batching: "auto", "padded", "packed" or "book".
        examples: to train on, each of at most `context` + 1 tokens.
        rows: [B] of a batch.
        context: [T] positions of a row at most.
        fill: token that fills up rows.
        seed: of the run.

    Raises:
        DataError: conversations are not batched like this, or too few for one batch.
    """
    if batching == "packed":
        return Packed(examples, rows, context, fill, seed)
    if batching == "book":
        if len(examples) < rows:
            raise DataError(
                f"{len(examples)} conversations do not fill one batch of {rows} rows, "
                "and data.batching=book drops what is left over. Lower "
                "data.batch_size, or use data.batching=padded."
            )
        return Book(examples, rows, fill, seed)
    if batching == "mixed":
        raise DataError(
            "data.batching=mixed lets the documents of a row see each other, which "
            "conversations never do. Use packed or padded."
        )
    return padded(examples, rows, context, fill, seed)
