"""Batches of the book's data loaders, in the book's order.

Model initialization, training epochs and evaluation passes share one random generator.
A pass draws all of its random numbers when it starts, so an evaluation within an epoch
changes the order of later epochs only. On a CPU the book's dropout draws from the same
generator; these are the batches without dropout, or with training on a GPU.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from gptjax.book.torch_random import TorchGenerator
from gptjax.config import COUNT, convert_option
from gptjax.data.sft import TRAIN_ON_COMPLETIONS, PaddedBatches, SFTBatching
from gptjax.errors import ConfigError, DataError

BatchIndices = list[list[int]]
NUMBERS_PER_PASS = 2  # 32-bit numbers drawn by every pass, for worker seeds
NUMBERS_PER_SHUFFLED_PASS = 4  # drawn by a shuffled pass, including its own seed


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batch order of PyTorch's DataLoader."""

    items: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        """Checks that there is at least one batch."""
        convert_option("items", self.items, int, COUNT)
        convert_option("batch_size", self.batch_size, int, COUNT)
        if self.drop_last and self.items < self.batch_size:
            raise ConfigError(
                f"{self.items} items are fewer than batch_size={self.batch_size}. "
                "Reduce batch_size, or set drop_last=False."
            )

    @property
    def numbers_per_pass(self) -> int:
        """Number of 32-bit numbers that a pass draws from the generator."""
        return NUMBERS_PER_SHUFFLED_PASS if self.shuffle else NUMBERS_PER_PASS

    def start_epoch(self, generator: TorchGenerator) -> BatchIndices:
        """Starts a pass and returns its batches of item indices.

        >>> Loader(5, 2).start_epoch(TorchGenerator(123))
        [[3, 1], [0, 2]]
        """
        *_, high, low = generator.next_uint32(self.numbers_per_pass).tolist()
        order = list(range(self.items))
        if self.shuffle:
            sampler = TorchGenerator((high << 32 | low) & (2**63 - 1))
            order = sampler.permutation(self.items).tolist()
        stop = self.items - (self.items % self.batch_size if self.drop_last else 0)
        starts = range(0, stop, self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]


def epochs(
    n_items: int,
    batch_size: int,
    seed: int | TorchGenerator = 123,
    shuffle: bool = True,
    drop_last: bool = True,
    *,
    eval_every: int = 0,
    eval_after: int = 0,
) -> Iterator[BatchIndices]:
    """Yields the training batches of the book, one list per epoch, without end.

    An evaluation starts two passes: one over the training loader, and one over an
    unshuffled validation loader. Their random numbers are skipped when the next epoch
    is requested. If a training loop evaluates differently, pass a generator, leave out
    the evaluations, and call `Loader.start_epoch` for each pass.

    Args:
        n_items: number of training rows.
        batch_size: rows per batch.
        seed: seed of a new generator, or the generator that initialized the model.
        shuffle: shuffle the training rows.
        drop_last: drop the last batch if it is not full.
        eval_every: steps between evaluations, the first at step 0 (the book's
            eval_freq); 0 = none.
        eval_after: evaluations at the end of each epoch: 1 in chapter 6, else 0.

    Raises:
        ConfigError: there is no full batch, or an evaluation option is negative.

    >>> next(epochs(5, 2))
    [[3, 1], [0, 2]]
    """
    if min(eval_every, eval_after) < 0:
        raise ConfigError(
            f"eval_every={eval_every} and eval_after={eval_after} must be at least 0 "
            "(0 = no evaluation)."
        )
    loader = Loader(n_items, batch_size, shuffle, drop_last)
    generator = TorchGenerator(seed) if isinstance(seed, int) else seed
    return iterate_epochs(loader, generator, eval_every, eval_after)


def iterate_epochs(
    loader: Loader, generator: TorchGenerator, eval_every: int, eval_after: int
) -> Iterator[BatchIndices]:
    """Yields the batches of `epochs`; draws the numbers of an epoch on request."""
    step = 0
    while True:
        batches = loader.start_epoch(generator)
        yield batches
        stop, evaluations = step + len(batches), eval_after
        if eval_every:
            evaluations += -(-stop // eval_every) - -(-step // eval_every)
        generator.next_uint32((loader.numbers_per_pass + NUMBERS_PER_PASS) * evaluations)
        step = stop


@dataclasses.dataclass(frozen=True, eq=False)
class BookBatches(PaddedBatches):
    """Batches in the order of a shuffling DataLoader: `data.batching = "book"`.

    Each is padded to its longest row; an incomplete last batch is dropped.
    """

    def __post_init__(self) -> None:
        """Checks that there is at least one batch."""
        if len(self.examples) < self.rows:
            raise DataError(
                f"{len(self.examples)} conversations do not fill one batch of {self.rows} "
                "rows, and data.batching=book drops incomplete batches. Decrease "
                "data.batch_size, or use data.batching=padded."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return len(self.examples) // self.rows

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one instance per run)
    def epoch_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns (length, example indices) of each batch of an epoch."""
        generator = TorchGenerator(self.seed)
        generator.next_uint32(NUMBERS_PER_SHUFFLED_PASS * epoch)
        batches = Loader(len(self.examples), self.rows).start_epoch(generator)
        return [(max(self.lengths[n] for n in batch), np.array(batch)) for batch in batches]


# The header before a response is trained on as well, as in exercise 7.2.
BOOK_BATCHING = SFTBatching(BookBatches, TRAIN_ON_COMPLETIONS | {"header"})
