"""Language-modeling batches as a pure function of (tokens, seed, step).

There is no iterator state: a run resumed at step n reads the same batch as an
uninterrupted one, on any number of hosts.

Each epoch splits the stream, treated as circular, into rows of T + 1 tokens that
overlap by one, so that each token is a target at most once per epoch (up to T tokens
are left out). The offset of the first row and the order of the rows are drawn anew
for each epoch.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.token_files import TokenDataset
from gptjax.errors import DataError
from gptjax.runtime.timing import log_progress


class Batch(TypedDict):
    """Batch of one step: NumPy arrays on the host, a pytree for `jax.jit`."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]  # tokens shifted left by one
    loss_weights: Float32[np.ndarray, "B T"]  # loss mask: 1 if the target counts
    segment_ids: Int32[np.ndarray, "B T"]  # document in the row, from 1
    positions: Int32[np.ndarray, "B T"]  # in the document, from 0


def make_lm_batch(row: Int32[np.ndarray, "B _"], eot: int | None) -> Batch:
    """Makes a next-token prediction batch of T + 1 tokens per row, all with weight 1.

    A document starts with the token `eot`; None: each row is one document.
    """
    token_BT = row[:, :-1]
    start_BT = token_BT == eot if eot is not None else np.zeros(token_BT.shape, bool)
    start_BT[:, 0] = True
    index_BT = np.broadcast_to(np.arange(start_BT.shape[1]), start_BT.shape)
    document_start_BT = np.maximum.accumulate(np.where(start_BT, index_BT, 0), axis=1)
    return Batch(
        tokens=np.ascontiguousarray(token_BT),
        targets=np.ascontiguousarray(row[:, 1:]),
        loss_weights=np.ones(token_BT.shape, np.float32),
        segment_ids=np.cumsum(start_BT, axis=1, dtype=np.int32),
        positions=(index_BT - document_start_BT).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LMBatches:
    """Training batches of a run; deterministic."""

    tokens: TokenDataset
    _: dataclasses.KW_ONLY
    rows: int  # [B] in the global batch
    context: int  # [T] targets per row
    seed: int  # of offsets and order
    isolate_documents: bool  # keep attention inside documents
    local_rows: Sequence[int] | None = None  # of each batch, read by this process; None: all

    def __post_init__(self) -> None:
        """Checks that there is at least one row."""
        if len(self.tokens) < self.context + 1:
            raise DataError(
                f"{len(self.tokens)} tokens are too few for model.context_length="
                f"{self.context}, which needs {self.context + 1}. Add text or lower "
                "model.context_length."
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the tokens."""
        return (len(self.tokens) - 1) // self.context

    @property
    def steps_per_epoch(self) -> float:
        """Steps for one pass over the tokens."""
        return self.rows_per_epoch / self.rows

    @functools.cached_property
    def epoch_order(self) -> grain.MapDataset:
        """Row of the epoch for each row of the run; a permutation in every epoch."""
        seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        return grain.MapDataset.range(self.rows_per_epoch).seed(seed).shuffle().repeat()

    def batch_at(self, step: int) -> Batch:
        """Returns this process's rows of the batch of one step, counted from 0."""
        local_rows = range(self.rows) if self.local_rows is None else self.local_rows
        row = [self.row_at(step * self.rows + n) for n in local_rows]
        return make_lm_batch(np.stack(row), self.tokens.eot if self.isolate_documents else None)

    def row_at(self, number: int) -> Int32[np.ndarray, " _"]:
        """Returns the T + 1 tokens of one row of the run."""
        # A prepared stream starts and ends with eot, so dropping the last token makes
        # it circular.
        stream_length, row_length = len(self.tokens) - 1, self.context + 1
        epoch = number // self.rows_per_epoch
        offset = epoch_offset(self.seed, epoch, stream_length)
        row_index: Any = self.epoch_order[number]
        start = (offset + row_index * self.context) % stream_length
        head = self.tokens.read(start, min(row_length, stream_length - start))
        rest = self.tokens.read(0, row_length - len(head))
        return np.concatenate([head, rest])

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields `batch_at` for the steps [start, stop)."""
        return map(self.batch_at, range(start, stop))


@functools.lru_cache(maxsize=8)
def epoch_offset(seed: int, epoch: int, stream_length: int) -> int:
    """Draws the offset of the first row of an epoch."""
    return int(np.random.default_rng((seed, epoch)).integers(stream_length))


def validation_batches(
    tokens: TokenDataset,
    *,
    rows: int,
    context: int,
    isolate_documents: bool,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Yields batches in which every token but the first is a target exactly once.

    The last batch is padded with loss weights of 0, so that all have the same shape.
    `max_batches` are evenly spaced.
    """
    num_targets, batch_tokens = len(tokens) - 1, rows * context
    count = -(-num_targets // batch_tokens)
    selected = range(count)
    if max_batches is not None and max_batches < count:
        selected = [i * count // max_batches for i in range(max_batches)]
    index_BT = np.arange(batch_tokens).reshape(rows, context)
    for number in log_progress(selected, len(selected), "scoring", "batches"):
        start = number * batch_tokens
        values = tokens.read(start, min(batch_tokens, num_targets - start) + 1)
        padded = np.full(batch_tokens + 1, tokens.eot, np.int32)
        padded[: len(values)] = values
        row = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context]
        batch = make_lm_batch(row, tokens.eot if isolate_documents else None)
        batch["loss_weights"][index_BT >= len(values) - 1] = 0
        yield batch
