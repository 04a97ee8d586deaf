"""Batches of a better and a worse answer to the same messages."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.dealing import Deal, buckets
from gptjax.data.example_batches import filled
from gptjax.data.examples import Example

CHOSEN, REJECTED = 0, 1  # places on the axis of the two


class PairBatch(TypedDict):
    """What one step reads; the second axis has the chosen and the rejected answer."""

    tokens: Int32[np.ndarray, "B 2 T"]
    targets: Int32[np.ndarray, "B 2 T"]
    weights: Float32[np.ndarray, "B 2 T"]  # 1 where the target is part of an answer
    segments: Int32[np.ndarray, "B 2 T"]
    positions: Int32[np.ndarray, "B 2 T"]
    reference: Float32[np.ndarray, "B 2"]  # log-probabilities under the start; nats


class PairBatches(NamedTuple):
    """The batches of a run, a pure function of (pairs, seed, step)."""

    pairs: Sequence[tuple[Example, Example]]
    reference: Float32[np.ndarray, "P 2"]  # of each of the P pairs
    deal: Deal
    fill: int  # token that fills up rows

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass through the pairs."""
        return self.deal.steps_per_epoch

    @property
    def shapes(self) -> list[int]:
        """Lengths of rows that occur."""
        return self.deal.shapes

    def batch_at(self, step: int) -> PairBatch:
        """The batch of one training step, counted from 0."""
        return self.batch(*self.deal.at(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, PairBatch]]:
        """(numbers of the pairs, batch) so that each comes once."""
        for size, chosen in self.deal.plan(None):
            yield chosen, self.batch(size, chosen)

    def batch(self, size: int, chosen: Iterable[Any]) -> PairBatch:
        """The chosen pairs, and empty ones up to the size of a batch."""
        numbers = list(chosen)
        rows = [[example] for n in numbers for example in self.pairs[n]]
        rows += [[]] * (2 * self.deal.rows - len(rows))
        flat: Any = filled(rows, size, self.fill)
        batch: Any = {name: array.reshape(-1, 2, size) for name, array in flat.items()}
        reference = np.zeros((self.deal.rows, 2), np.float32)
        reference[: len(numbers)] = self.reference[numbers]
        return batch | {"reference": reference}


def pair_batches(
    pairs: Sequence[tuple[Example, Example]],
    *,
    rows: int,
    context: int,
    fill: int,
    seed: int = 0,
    reference: np.ndarray | None = None,
) -> PairBatches:
    """The batches of pairs that fit `context`; without a reference it is 0."""
    lengths = [max(len(x.ids) for x in pair) - 1 for pair in pairs]
    if reference is None:
        reference = np.zeros((len(pairs), 2), np.float32)
    deal = Deal(lengths, rows, buckets(context), seed)
    return PairBatches(pairs, reference, deal, fill)
