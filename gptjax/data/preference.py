"""Batches of preference pairs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.bucketing import BucketedBatches
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


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceBatches(BucketedBatches):
    """Length-bucketed batches of preference pairs."""

    pairs: Sequence[tuple[Example, Example]]
    reference_logprobs: Float32[np.ndarray, "P 2"]  # of the P pairs (nats)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Positions of the longer example of each pair."""
        return [max(len(example.ids) for example in pair) - 1 for pair in self.pairs]

    def make_batch(self, length: int, indices: Sequence[int] | np.ndarray) -> PreferenceBatch:
        """Returns the pairs at these indices, with empty pairs as padding."""
        rows = [[example] for n in indices for example in self.pairs[n]]
        rows += [[]] * (2 * self.rows - len(rows))
        flat: Any = collate(rows, length, self.pad_id)
        batch: Any = {name: array.reshape(-1, 2, length) for name, array in flat.items()}
        logprob_B2 = np.zeros((self.rows, 2), np.float32)
        logprob_B2[: len(indices)] = self.reference_logprobs[indices]
        return batch | {"reference_logprobs": logprob_B2}
