"""Batches of preference pairs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.bucketing import BucketSampler, buckets
from gptjax.data.sft import Example, collate

CHOSEN, REJECTED = 0, 1  # indices on the pair axis


class PreferenceBatch(TypedDict):
    """Input of one DPO step; axis 1 is (chosen, rejected)."""

    tokens: Int32[np.ndarray, "B 2 T"]
    targets: Int32[np.ndarray, "B 2 T"]
    loss_weights: Float32[np.ndarray, "B 2 T"]  # 1 if the target is in a response
    segment_ids: Int32[np.ndarray, "B 2 T"]
    positions: Int32[np.ndarray, "B 2 T"]
    # Log-probabilities under the initial model (nats).
    reference_logprobs: Float32[np.ndarray, "B 2"]


class PreferenceBatches(NamedTuple):
    """Length-bucketed batches: a pure function of (pairs, seed, step)."""

    pairs: Sequence[tuple[Example, Example]]
    reference_logprobs: Float32[np.ndarray, "P 2"]  # log-probs of P pairs (nats)
    sampler: BucketSampler
    pad_id: int  # padding token

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return self.sampler.steps_per_epoch

    @property
    def batch_shapes(self) -> list[int]:
        """Row lengths that occur."""
        return self.sampler.batch_shapes

    def batch_at(self, step: int) -> PreferenceBatch:
        """Returns the batch of a training step, counted from 0."""
        return self.make_batch(*self.sampler.batch_rows(step))

    def in_order(self) -> Iterator[tuple[np.ndarray, PreferenceBatch]]:
        """Yields (pair indices, batch); every pair occurs once."""
        for length, indices in self.sampler.epoch_plan(None):
            yield indices, self.make_batch(length, indices)

    def make_batch(self, length: int, indices: Iterable[Any]) -> PreferenceBatch:
        """Returns the pairs at these indices, with empty pairs as padding."""
        pair_indices = list(indices)
        rows = [[example] for n in pair_indices for example in self.pairs[n]]
        rows += [[]] * (2 * self.sampler.rows - len(rows))
        flat: Any = collate(rows, length, self.pad_id)
        batch: Any = {name: array.reshape(-1, 2, length) for name, array in flat.items()}
        logprob_B2 = np.zeros((self.sampler.rows, 2), np.float32)
        logprob_B2[: len(pair_indices)] = self.reference_logprobs[pair_indices]
        return batch | {"reference_logprobs": logprob_B2}


def make_preference_batches(
    pairs: Sequence[tuple[Example, Example]],
    *,
    rows: int,
    context: int,
    pad_id: int,
    seed: int = 0,
    reference_logprobs: np.ndarray | None = None,
) -> PreferenceBatches:
    """Creates `PreferenceBatches`; each pair must fit `context`.

    Without `reference_logprobs`, zeros are used.
    """
    lengths = [max(len(x.ids) for x in pair) - 1 for pair in pairs]
    if reference_logprobs is None:
        reference_logprobs = np.zeros((len(pairs), 2), np.float32)
    sampler = BucketSampler(lengths, rows, buckets(context), seed)
    return PreferenceBatches(pairs, reference_logprobs, sampler, pad_id)
