"""Batches as a pure function of (tokens, seed, step).

There is no iterator state: resuming at step n reads what an unbroken run would have
read there, on any number of hosts.

An epoch cuts the stream, read in a circle, into rows of T + 1 tokens that overlap by
one, so that each token is a target at most once in an epoch (the T or fewer left over
are not). Where the circle is cut first, and the order of the rows, are drawn anew for
each epoch.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.shards import Tokens
from gptjax.errors import DataError


class Batch(TypedDict):
    """What one step reads; NumPy on the host, a pytree for `jax.jit`."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]  # tokens moved left by one
    weights: Float32[np.ndarray, "B T"]  # 1 where the target counts
    segments: Int32[np.ndarray, "B T"]  # 1, 2, ... documents of the row
    positions: Int32[np.ndarray, "B T"]  # from 0 in each document of the row


def pack(row: Int32[np.ndarray, "B _"], eot: int | None) -> Batch:
    """The batch that predicts each token of the rows but the first, all weights 1.

    Args:
        row: T + 1 tokens in each of B rows.
        eot: the token that starts a document, which sees nothing of those before it;
            None makes one document of each row.
    """
    token_BT = row[:, :-1]
    start_BT = token_BT == eot if eot is not None else np.zeros(token_BT.shape, bool)
    start_BT[:, 0] = True
    place_BT = np.broadcast_to(np.arange(start_BT.shape[1]), start_BT.shape)
    first_BT = np.maximum.accumulate(np.where(start_BT, place_BT, 0), axis=1)
    return Batch(
        tokens=np.ascontiguousarray(token_BT),
        targets=np.ascontiguousarray(row[:, 1:]),
        weights=np.ones(token_BT.shape, np.float32),
        segments=np.cumsum(start_BT, axis=1, dtype=np.int32),
        positions=(place_BT - first_BT).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run; see `make_batches`."""

    tokens: Tokens
    rows: int
    context: int
    seed: int
    packed: bool
    here: Sequence[int]

    @property
    def rows_per_epoch(self) -> int:
        """Rows that one pass through the tokens has."""
        return (len(self.tokens) - 1) // self.context

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass through the tokens takes."""
        return self.rows_per_epoch / self.rows

    @functools.cached_property
    def order(self) -> grain.MapDataset:
        """Row of its epoch for each row of the run, never the same twice an epoch."""
        seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        return grain.MapDataset.range(self.rows_per_epoch).seed(seed).shuffle().repeat()

    def batch_at(self, step: int) -> Batch:
        """The rows that are read here of the batch of one step, counted from 0.

        Raises:
            DataError: a token id is out of range.
        """
        row = [self.row(step * self.rows + n) for n in self.here]
        return pack(np.stack(row), self.tokens.eot if self.packed else None)

    def row(self, number: int) -> Int32[np.ndarray, " _"]:
        """The T + 1 tokens of one row of the run."""
        # The last token of a prepared stream is eot, as the first one is, and closes
        # the circle.
        around, need = len(self.tokens) - 1, self.context + 1
        epoch = number // self.rows_per_epoch
        first = first_cut(self.seed, epoch, around)
        nth: Any = self.order[number]
        start = (first + nth * self.context) % around
        head = self.tokens.read(start, min(need, around - start))
        rest = self.tokens.read(0, need - len(head))
        return np.concatenate([head, rest])

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """`batch_at` of the steps from `start` to before `stop`, read ahead."""
        if start < stop:
            steps = grain.MapDataset.range(start, stop).map(self.batch_at)
            yield from steps.to_iter_dataset(READ_AHEAD)


@functools.lru_cache(maxsize=8)
def first_cut(seed: int, epoch: int, around: int) -> int:
    """Where a circle of that many tokens is cut first in an epoch."""
    return int(np.random.default_rng((seed, epoch)).integers(around))


# One thread: the work is in Python, where a second one only gets in its way.
READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


def make_batches(
    tokens: Tokens,
    *,
    rows: int,
    context: int,
    seed: int,
    packed: bool,
    here: Sequence[int] | None = None,
) -> Batches:
    """The batches of a run: same arguments, same batches.

    Args:
        tokens: to train on.
        rows: [B] in the batch of all hosts together.
        context: [T] targets in a row.
        seed: of the run.
        packed: whether documents of one row are kept apart.
        here: which rows of each batch are read; all, unless other processes read
            the others.

    Raises:
        DataError: there are not enough tokens for one row.
    """
    if len(tokens) < context + 1:
        raise DataError(
            f"{len(tokens)} tokens do not fill one row: model.context_length={context} "
            f"needs {context + 1}. Add text or lower model.context_length."
        )
    here = range(rows) if here is None else here
    return Batches(tokens, rows, context, seed, packed, here)


def validation_batches(
    tokens: Tokens, *, rows: int, context: int, packed: bool, limit: int | None = None
) -> Iterator[Batch]:
    """Batches in which every token but the first is a target exactly once.

    The last one is filled with weights of 0, so that all have one shape.

    Args:
        tokens: to score, at least two.
        rows: [B] rows of a batch.
        context: [T] targets in a row.
        packed: whether documents of one row are kept apart.
        limit: batches, evenly apart, where all of them would take too long.
    """
    targets, each = len(tokens) - 1, rows * context
    count = -(-targets // each)
    chosen = range(count)
    if limit is not None and limit < count:
        chosen = [i * count // limit for i in range(limit)]
    place_BT = np.arange(each).reshape(rows, context)
    for number in chosen:
        start = number * each
        read = tokens.read(start, min(each, targets - start) + 1)
        padded = np.full(each + 1, tokens.eot, np.int32)
        padded[: len(read)] = read
        row = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context]
        batch = pack(row, tokens.eot if packed else None)
        batch["weights"][place_BT >= len(read) - 1] = 0
        yield batch
