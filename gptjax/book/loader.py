"""The batches of the book's DataLoaders, in its order.

A generator is shared: the parameters of a model, the epochs of training and the passes
of evaluation take their numbers from it in turn. A pass takes its own when it begins,
all of them, however soon it is left: so an evaluation within an epoch does not change
that epoch, but those after it. On a CPU the book's dropout takes numbers as well; these
are the batches of a model without dropout, or of one that trains on a GPU.
"""

import dataclasses
from collections.abc import Iterator

from gptjax.book.torch_random import TorchGenerator
from gptjax.config import at_least
from gptjax.data.torch_order import permutation
from gptjax.errors import ConfigError

Batches = list[list[int]]
BASE = 2  # 32-bit numbers that every pass takes, for workers that it may have
SHUFFLED = 4  # and a shuffled one: its own seed too


@dataclasses.dataclass(frozen=True)
class Loader:
    """What PyTorch's DataLoader of that many items goes through."""

    items: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        """Rejects loaders without a batch."""
        at_least("loader", self, 1, "items batch_size")
        if self.drop_last and self.items < self.batch_size:
            raise ConfigError(
                f"{self.items} items make no batch of {self.batch_size}. Choose a "
                "smaller batch_size, or drop_last=False."
            )

    @property
    def taken(self) -> int:
        """32-bit numbers that a pass takes from the generator."""
        return SHUFFLED if self.shuffle else BASE

    def begin(self, generator: TorchGenerator) -> Batches:
        """The batches of the pass that begins now, as numbers of items.

        >>> Loader(5, 2).begin(TorchGenerator(123))
        [[3, 1], [0, 2]]
        """
        *_, high, low = generator.numbers(self.taken).tolist()
        order = list(range(self.items))
        if self.shuffle:
            order = permutation((high << 32 | low) & (2**63 - 1), self.items)
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
) -> Iterator[Batches]:
    """Epoch after epoch, the batches that the book's training loops go through.

    An evaluation begins two passes: one over the training loader, one over a validation
    loader that does not shuffle. Those of an epoch are made up for when the next epoch
    is asked for. A loop that uses its loaders in another way passes its own generator,
    leaves out the evaluations, and calls `Loader.begin` for each use.

    Args:
        n_items: rows of the training set.
        batch_size: rows of a batch.
        seed: of a new generator; or the one that made the model's parameters, which
            the book's loops go on with.
        shuffle: whether the training loader shuffles.
        drop_last: whether it leaves out a last batch that is not full.
        eval_every: steps from one evaluation to the next, the first of them at step 0;
            the book's eval_freq. 0: none.
        eval_after: evaluations at the end of each epoch. 1 in chapter 6, which takes
            the accuracy then; 0 in the others.

    Raises:
        ConfigError: there is no batch, or a negative number of evaluations.

    >>> next(epochs(5, 2))
    [[3, 1], [0, 2]]
    """
    if min(eval_every, eval_after) < 0:
        raise ConfigError(
            f"eval_every={eval_every} and eval_after={eval_after} need to be 0 or "
            "more. Use 0 for no evaluation."
        )
    loader = Loader(n_items, batch_size, shuffle, drop_last)
    generator = TorchGenerator(seed) if isinstance(seed, int) else seed
    return passes(loader, generator, eval_every, eval_after)


def passes(
    loader: Loader, generator: TorchGenerator, eval_every: int, eval_after: int
) -> Iterator[Batches]:
    """What `epochs` yields; the numbers of an epoch are taken when it is asked for."""
    step = 0
    while True:
        batches = loader.begin(generator)
        yield batches
        stop, evaluations = step + len(batches), eval_after
        if eval_every:
            evaluations += -(-stop // eval_every) - -(-step // eval_every)
        generator.numbers((loader.taken + BASE) * evaluations)
        step = stop
