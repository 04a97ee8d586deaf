"""Tokenized conversations with loss masks, and batches of them or of preference pairs.

Batches are length-bucketed or packed. The loss mask depends on a token's position in
the conversation, never on its id: GPT-2 uses the token that ends a response for padding
as well.
"""

import dataclasses
import functools
import itertools
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from gptjax.data.bucketing import BucketedBatches, buckets
from gptjax.data.conversations import Conversation
from gptjax.data.lm import Batch
from gptjax.data.packed_rows import PackedRows, pack_columns
from gptjax.errors import ConfigError
from gptjax.plugins import load_plugin
from gptjax.tokenizer.chat_template import ChatTemplate, TemplateSegment
from gptjax.tokenizer.tokenizer import ENDOFTEXT, Tokenizer

TRAIN_ON_COMPLETIONS = frozenset({"answer"})
TRAIN_ON_ALL = frozenset({"prompt", "header", "answer"})
CHOSEN, REJECTED = 0, 1  # indices on the pair axis


class Example(NamedTuple):
    """Tokenized conversation with a loss mask."""

    ids: list[int]
    loss_mask: list[bool]  # True for tokens that are trained on as targets
    answer_spans: list[tuple[int, int]]  # (start, stop), end token included


def encode_segments(
    tokenizer: Tokenizer,
    segments: Iterable[TemplateSegment],
    train_on: Collection[str] = TRAIN_ON_COMPLETIONS,
) -> Example:
    """Tokenizes a rendered conversation; `train_on` are kinds of segments.

    Prompt, header and answer are encoded separately, like in generation, so that no
    token spans two of them. Message texts never yield control tokens.
    """
    example = Example([], [], [])
    eot = tokenizer.special_tokens.get(ENDOFTEXT, tokenizer.eot_token)
    special = tokenizer.special_tokens.keys() - {ENDOFTEXT}
    for kind, group in itertools.groupby(segments, key=lambda segment: segment.kind):
        ids = []
        for segment in group:
            encoded = tokenizer.encode(segment.text, segment.control_tokens & special)
            ids += [eot] if segment.is_eot else encoded
        if not example.ids:
            prefix = tokenizer.prefix_ids  # the template may have printed it
            ids = ids if ids[: len(prefix)] == prefix else prefix + ids
        start = len(example.ids)
        example.ids.extend(ids)
        example.loss_mask.extend([kind in train_on] * len(ids))
        if kind == "answer":
            example.answer_spans.append((start, len(example.ids)))
    example.loss_mask[:1] = [False]  # the first token is never a target
    return example


def encode_conversations(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Iterable[Conversation],
    train_on: Collection[str] = TRAIN_ON_COMPLETIONS,
) -> Iterator[Example]:
    """Renders and tokenizes conversations."""
    for conversation in conversations:
        try:
            segments = template.segments(conversation.messages)
        except ConfigError as error:
            raise ConfigError(f"{conversation.location}: {error}") from error
        yield encode_segments(tokenizer, segments, train_on)


def truncate_left(example: Example, max_tokens: int) -> Example | None:
    """Truncates an example from the left to at most `max_tokens` tokens.

    Partially truncated answers are excluded from the loss. Returns None if the last
    answer and one token before it do not fit.
    """
    surplus = len(example.ids) - max_tokens
    if surplus <= 0:
        return example
    if surplus >= example.answer_spans[-1][0]:
        return None
    loss_mask, answer_spans = list(example.loss_mask), []
    for start, stop in example.answer_spans:
        if start < surplus:
            loss_mask[start:stop] = [False] * (stop - start)
        else:
            answer_spans.append((start - surplus, stop - surplus))
    loss_mask[surplus] = False
    return Example(example.ids[surplus:], loss_mask[surplus:], answer_spans)


class TruncatedExamples(NamedTuple):
    """Examples truncated to the context length."""

    examples: PackedRows[Example]
    kept_indices: Sequence[int]  # indices of `examples` in the input
    num_truncated: int  # examples truncated from the left
    num_dropped: int  # examples dropped because the last answer alone is too long


def truncate_all(examples: Iterable[Example], context: int) -> TruncatedExamples:
    """Truncates examples to `context` + 1 tokens and drops those that do not fit."""
    kept_indices, num_examples, num_truncated = array("q"), 0, 0

    def encoded_examples() -> Iterator[tuple[bytes]]:
        nonlocal num_examples, num_truncated
        for num_examples, example in enumerate(examples, 1):
            truncated = truncate_left(example, context + 1)
            if truncated is not None:
                kept_indices.append(num_examples - 1)
                num_truncated += truncated is not example
                yield (encode_example(truncated),)

    (packed,) = pack_columns(encoded_examples(), decode_example)
    return TruncatedExamples(packed, kept_indices, num_truncated, num_examples - len(packed))


def encode_example(example: Example) -> bytes:
    """Encodes an example: three sizes, spans, ids of 1, 2 or 4 bytes, mask as bits.

    >>> example = Example([0, 300], [False, True], [(1, 2)])
    >>> decode_example(bytearray(encode_example(example))) == example
    True
    """
    ids, spans = np.array(example.ids), np.array(example.answer_spans, np.int32)
    ids = ids.astype(np.min_scalar_type(ids.max()))
    sizes = np.array([len(spans), len(ids), ids.itemsize], np.int32)
    return b"".join(x.tobytes() for x in (sizes, spans, ids, np.packbits(example.loss_mask)))


def decode_example(encoded: bytearray) -> Example:
    """Reverses `encode_example`."""
    num_spans, num_ids, itemsize = np.frombuffer(encoded, np.int32, 3).tolist()
    ends = np.frombuffer(encoded, np.int32, 2 * num_spans, 12)
    start = 12 + ends.nbytes
    ids = np.frombuffer(encoded, f"u{itemsize}", num_ids, start)
    bits = np.frombuffer(encoded, np.uint8, offset=start + ids.nbytes)
    loss_mask = np.unpackbits(bits, count=num_ids).astype(bool)
    spans = zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True)
    return Example(ids.tolist(), loss_mask.tolist(), [*spans])


def mask_all_but_answers(examples: PackedRows[Example]) -> Sequence[Example]:
    """Returns packed examples with the loss mask of `TRAIN_ON_COMPLETIONS`."""

    def decode(encoded: bytearray) -> Example:
        example = decode_example(encoded)
        loss_mask = [False] * len(example.ids)
        for start, stop in example.answer_spans:
            loss_mask[start:stop] = [True] * (stop - start)
        loss_mask[0] = False
        return example._replace(loss_mask=loss_mask)

    return dataclasses.replace(examples, decode=decode)


def collate(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """Collates examples into a batch of rows of `length` positions.

    An example of n tokens takes n - 1 positions: its last token is only a target, its
    first only an input. Padding has weight 0.
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


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedBatches(BucketedBatches):
    """Length-bucketed batches with one example per row."""

    examples: Sequence[Example]

    @functools.cached_property
    def lengths(self) -> Sequence[int]:
        """Positions of each example."""
        return array("q", (len(example.ids) - 1 for example in self.examples))

    def make_batch(self, length: int, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the examples at these indices, with empty rows as padding."""
        rows = [[self.examples[n]] for n in indices]
        return collate(rows + [[]] * (self.rows - len(rows)), length, self.pad_id)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatches(PaddedBatches):
    """Batches of the longest length, with several examples per row.

    They are packed alike in every epoch.
    """

    @functools.cached_property
    def bins(self) -> list[list[int]]:
        """Example indices per row: best-fit decreasing bin packing."""
        context = self.bucket_lengths[-1]
        bins: list[list[int]] = []
        bins_by_space: dict[int, list[int]] = {}  # positions left: bin indices
        lengths = [len(example.ids) - 1 for example in self.examples]
        for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            spaces = range(lengths[n], context + 1)
            space = next((space for space in spaces if bins_by_space.get(space)), None)
            if space is None:
                bins.append([])
                space, bin_index = context, len(bins) - 1
            else:
                bin_index = bins_by_space[space].pop()
            bins[bin_index].append(n)
            bins_by_space.setdefault(space - lengths[n], []).append(bin_index)
        return bins

    @property
    def lengths(self) -> Sequence[int]:
        """Length of each row."""
        return [self.bucket_lengths[-1]] * len(self.bins)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one instance per run)
    def epoch_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Returns (length, row indices) of each batch of an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.bins))
        starts = range(0, len(order), self.rows)
        return [(self.bucket_lengths[-1], order[n : n + self.rows]) for n in starts]

    def make_batch(self, length: int, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the rows at these indices, with empty ones as padding."""
        rows = [[self.examples[n] for n in self.bins[row]] for row in indices]
        return collate(rows + [[]] * (self.rows - len(rows)), length, self.pad_id)


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


class SFTBatching(NamedTuple):
    """Way of batching conversations, a value of `data.batching`."""

    batches: type[PaddedBatches]
    completion_segments: frozenset[str] = TRAIN_ON_COMPLETIONS  # if completion_only_loss


SFT_BATCHING = {
    "auto": SFTBatching(PaddedBatches),
    "padded": SFTBatching(PaddedBatches),
    "packed": SFTBatching(PackedBatches),
}


def find_sft_batching(batching: str) -> SFTBatching:
    """Finds the way of batching with a name, one of `SFT_BATCHING` or of a plugin."""
    if batching == "concat":
        raise ConfigError("data.batching=concat is for documents only. Use packed or padded.")
    return SFT_BATCHING.get(batching) or load_plugin("data.batching", batching)


def make_sft_batches(
    batching: str, examples: Sequence[Example], *, rows: int, context: int, pad_id: int, seed: int
) -> PaddedBatches:
    """Makes the batches of examples of at most `context` + 1 tokens."""
    options = {"rows": rows, "bucket_lengths": buckets(context), "pad_id": pad_id, "seed": seed}
    return find_sft_batching(batching).batches(examples, **options)
