"""Rendered conversations as tokens, and which of these are learned.

What is learned is decided by where a token stands in the conversation, never by its
id: GPT-2 fills rows up with the same token that ends an answer.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from gptjax.data.conversations import Conversation
from gptjax.errors import ConfigError
from gptjax.template import Piece, Template
from gptjax.tokenizer import Tokenizer

ANSWERS = frozenset({"answer"})
EVERYTHING = frozenset({"prompt", "header", "answer"})


class Example(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    learned: list[bool]  # of each token, whether its prediction counts
    answers: list[tuple[int, int]]  # where each starts and stops, its end included


def encode(
    tokenizer: Tokenizer,
    pieces: Iterable[Piece],
    learned: Collection[str] = ANSWERS,
) -> Example:
    """The tokens of a conversation.

    Prompt, header and answer are encoded apart, as they are when an answer is asked
    for: no token reaches from one into the next. Messages are ordinary text, in which
    no control token is found.

    Args:
        tokenizer: of the model.
        pieces: `gptjax.template.Template.pieces`.
        learned: kinds of pieces whose tokens are learned.
    """
    example = Example([], [], [])
    for kind, group in itertools.groupby(pieces, key=lambda piece: piece.kind):
        ids = []
        for piece in group:
            ids += [tokenizer.eot] if piece.end else tokenizer.encode(piece.text)
        start = len(example.ids)
        example.ids.extend(ids)
        example.learned.extend([kind in learned] * len(ids))
        if kind == "answer":
            example.answers.append((start, len(example.ids)))
    example.learned[:1] = [False]  # nothing stands before it that could predict it
    return example


def encode_all(
    tokenizer: Tokenizer,
    template: Template,
    conversations: Iterable[Conversation],
    learned: Collection[str] = ANSWERS,
) -> list[Example]:
    """The tokens of each conversation.

    Raises:
        ConfigError: the template cannot render one of them; says which.
    """
    examples = []
    for conversation in conversations:
        try:
            pieces = template.pieces(conversation.messages)
        except ConfigError as error:
            raise ConfigError(f"{conversation.place}: {error}") from error
        examples.append(encode(tokenizer, pieces, learned))
    return examples


def fitted(example: Example, most: int) -> Example | None:
    """The example with at most `most` tokens, the last answer whole.

    It is cut at its front; what is left there of an answer is not learned.

    Returns:
        None where the last answer and a token before it do not fit.
    """
    surplus = len(example.ids) - most
    if surplus <= 0:
        return example
    if surplus >= example.answers[-1][0]:
        return None
    learned = list(example.learned)
    for start, stop in example.answers:
        if start < surplus:
            learned[start:stop] = [False] * (stop - start)
    learned[surplus] = False
    answers = [
        (start - surplus, stop - surplus)
        for start, stop in example.answers
        if start >= surplus
    ]
    return Example(example.ids[surplus:], learned[surplus:], answers)


class Fitted(NamedTuple):
    """Examples that fit a model's rows, and what that took."""

    examples: list[Example]
    kept: list[int]  # their numbers among those that were given
    cut: int  # of these, how many lost tokens at their front
    skipped: int  # left out, as the answer alone is too long


def fit_all(examples: Sequence[Example], context: int) -> Fitted:
    """The examples as rows that predict at most `context` tokens each.

    Args:
        examples: from `encode`, each with an answer.
        context: [T] inputs of a row; the last token of an example is only predicted.
    """
    found = [(n, fitted(example, context + 1)) for n, example in enumerate(examples)]
    fitting = [(n, example) for n, example in found if example is not None]
    cut = sum(len(example.ids) < len(examples[n].ids) for n, example in fitting)
    skipped = len(examples) - len(fitting)
    return Fitted([x for _, x in fitting], [n for n, _ in fitting], cut, skipped)
