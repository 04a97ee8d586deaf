"""Tokenized conversations with loss masks.

The loss mask depends on a token's position in the conversation, never on its id: GPT-2
uses the token that ends a response for padding as well.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from gptjax.data.conversations import Conversation
from gptjax.errors import ConfigError
from gptjax.template import TemplateSegment, ChatTemplate
from gptjax.tokenizer import Tokenizer

TRAIN_ON_COMPLETIONS = frozenset({"answer"})
TRAIN_ON_ALL = frozenset({"prompt", "header", "answer"})


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
    """Tokenizes a rendered conversation.

    Prompt, header and answer are encoded separately, like in generation, so that no
    token spans two of them. Message texts never yield control tokens.

    Args:
        tokenizer: of the model.
        segments: from `ChatTemplate.segments`.
        train_on: kinds of segments to train on.
    """
    example = Example([], [], [])
    for kind, group in itertools.groupby(segments, key=lambda piece: piece.kind):
        ids = []
        for segment in group:
            ids += (
                [tokenizer.eot_token]
                if segment.is_eot
                else tokenizer.encode(segment.text)
            )
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
) -> list[Example]:
    """Renders and tokenizes conversations.

    Raises:
        ConfigError: the template fails to render a conversation.
    """
    examples = []
    for conversation in conversations:
        try:
            segments = template.segments(conversation.messages)
        except ConfigError as error:
            raise ConfigError(f"{conversation.location}: {error}") from error
        examples.append(encode_segments(tokenizer, segments, train_on))
    return examples


def truncate_left(example: Example, max_tokens: int) -> Example | None:
    """Truncates an example from the left to at most `max_tokens` tokens.

    Partially truncated answers are excluded from the loss.

    Returns:
        None if the last answer and one token before it do not fit.
    """
    surplus = len(example.ids) - max_tokens
    if surplus <= 0:
        return example
    if surplus >= example.answer_spans[-1][0]:
        return None
    loss_mask = list(example.loss_mask)
    for start, stop in example.answer_spans:
        if start < surplus:
            loss_mask[start:stop] = [False] * (stop - start)
    loss_mask[surplus] = False
    answer_spans = [
        (start - surplus, stop - surplus)
        for start, stop in example.answer_spans
        if start >= surplus
    ]
    return Example(example.ids[surplus:], loss_mask[surplus:], answer_spans)


class TruncatedExamples(NamedTuple):
    """Examples truncated to the context length."""

    examples: list[Example]
    kept_indices: list[int]  # indices of `examples` in the input
    num_truncated: int  # examples truncated from the left
    num_dropped: int  # examples dropped because the last answer alone is too long


def truncate_all(examples: Sequence[Example], context: int) -> TruncatedExamples:
    """Truncates examples to `context` + 1 tokens and drops those that do not fit.

    Args:
        examples: from `encode_segments`, each with an answer.
        context: [T] input tokens per row; the last token is only a target.
    """
    truncated = [
        (n, truncate_left(example, context + 1)) for n, example in enumerate(examples)
    ]
    kept = [(n, example) for n, example in truncated if example is not None]
    num_truncated = sum(len(example.ids) < len(examples[n].ids) for n, example in kept)
    num_dropped = len(examples) - len(kept)
    return TruncatedExamples(
        [x for _, x in kept], [n for n, _ in kept], num_truncated, num_dropped
    )
