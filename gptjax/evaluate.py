"""Loss, perplexity and bits per byte of a model on text, every token scored once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from gptjax.config import GPTConfig
from gptjax.data.batches import Batch, pack
from gptjax.errors import ConfigError, DataError
from gptjax.loss import batch_token_nats
from gptjax.model import Params
from gptjax.sharding import on, place_batch, replicated
from gptjax.stopping import poll
from gptjax.weights.folder import Model

ROWS = 8  # in a batch of `score`
CHUNK = 256  # positions whose logits exist at a time
NO_TOKEN = "there is no token to score. Give text that is not empty."

Scorer = Callable[[Params, Any], Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # nats per token
    tokens: int  # that were predicted
    bytes: int  # of text that they stand for
    nats: float  # of all of them

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; depends on the tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers; None for text of no bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def numbers(self) -> dict[str, float | int | None]:
        """What metrics.jsonl records."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


def make_scorer(
    config: GPTConfig, chunk: int = CHUNK, mesh: Mesh | None = None
) -> Scorer:
    """A compiled function of (params, batch): nats of each target [B, T].

    Args:
        config: shape of the model.
        chunk: positions whose logits exist at a time.
        mesh: on which the parameters lie, if on one.
    """

    @jax.jit
    def nats(params: Params, batch: Any) -> Any:
        return replicated(batch_token_nats(config, params, batch, chunk=chunk))

    def score(params: Params, batch: Any) -> Any:
        with on(mesh):
            return nats(params, place_batch(batch, mesh, len(batch["tokens"])))

    return score


# A notebook that scores one text after the other compiles once.
scorer_of = functools.lru_cache(maxsize=4)(make_scorer)


def evaluate(
    scorer: Scorer, params: Params, batches: Iterable[Batch], byte_lengths: np.ndarray
) -> Evaluation:
    """Sums over all batches, in float64 on the host.

    Args:
        scorer: `make_scorer`.
        params: of the same model.
        batches: of one static shape; a target counts where its weight is 1, so its
            loss does not depend on what else is in the batch.
        byte_lengths: bytes that each token id stands for.
    """
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        poll()
        counted = batch["weights"] > 0
        nats += float(np.sum(np.asarray(scorer(params, batch), np.float64)[counted]))
        tokens += int(counted.sum())
        size += int(byte_lengths[batch["targets"][counted]].sum())
    if not tokens:
        raise DataError(NO_TOKEN)
    return Evaluation(nats / tokens, tokens, size, nats)


def windows(
    token_L: np.ndarray, context: int, stride: int, rows: int, eot: int | None
) -> Iterator[Batch]:
    """Batches of overlapping rows in which each token but the first is scored once.

    The first row scores all its targets, each next one the last `stride`: these see
    at least `context - stride` tokens before them.

    Args:
        token_L: the text, its first token only read.
        context: [T] inputs in a row.
        stride: how far a row starts after the one before, 1 to `context`.
        rows: [B] in a batch; the last batch is filled with rows of weight 0.
        eot: the token that starts a document, or None to let documents mix.
    """
    targets = len(token_L) - 1
    count = 1 + max(0, -(-(targets - context) // stride))
    padded = np.zeros(context + 1 + (count + rows) * stride, np.int32)
    padded[: len(token_L)] = token_L
    for first in range(0, count, rows):
        start_B = (first + np.arange(rows)) * stride
        row = padded[start_B[:, None] + np.arange(context + 1)]
        batch = pack(row, eot)
        place_BT = start_B[:, None] + np.arange(context)
        fresh_BT = (np.arange(context) >= context - stride) | (start_B[:, None] == 0)
        batch["weights"] = (fresh_BT & (place_BT < targets)).astype(np.float32)
        yield batch


def score(model: Model, text: str, *, stride: int | None = None) -> Evaluation:
    """How well the model predicts `text`, taken as one document.

    Args:
        model: from `gptjax.load`.
        text: not empty.
        stride: tokens between the starts of two windows; by default the context,
            which is fastest. Smaller ones give each token more to look back at.

    Raises:
        ConfigError: the stride is not between 1 and the context.
        DataError: the text is empty.
    """
    context = model.config.context_length
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ConfigError(
            f"--stride {stride} is not between 1 and the model's context of "
            f"{context}. Choose one that is, e.g. {context // 2}."
        )
    token_L = np.array([model.tokenizer.eot, *model.tokenizer.encode(text)], np.int32)
    return score_tokens(model, token_L, stride, None)


def token_nats(model: Model, text: str) -> tuple[list[int], Float32[np.ndarray, " L"]]:
    """The tokens of `text`, and the nats of each given all before it.

    The text is one document, as for `score`, whose loss is their mean: what is given
    begins with <|endoftext|>.

    Args:
        model: from `gptjax.load`.
        text: at most `context_length` tokens, not empty.

    Raises:
        ConfigError: the text is longer.
        DataError: it is empty.
    """
    context, ids = model.config.context_length, model.tokenizer.encode(text)
    if not ids:
        raise DataError(NO_TOKEN)
    if len(ids) > context:
        raise ConfigError(
            f"the text has {len(ids)} tokens, more than the model's context of "
            f"{context}. Shorten it, or use gptjax.score for its mean."
        )
    token_L = np.array([model.tokenizer.eot, *ids], np.int32)
    (batch,) = windows(token_L, context, context, 1, None)
    nat_BT = np.asarray(scorer_of(model.config)(model.params, batch), np.float32)
    return ids, nat_BT[0, : len(ids)]


def score_tokens(
    model: Model, token_L: np.ndarray, stride: int, eot: int | None
) -> Evaluation:
    """How well the model predicts tokens, the first of which is only read.

    Args:
        model: from `gptjax.load`.
        token_L: in the vocabulary of the model's tokenizer.
        stride: tokens between the starts of two windows, 1 to the context.
        eot: the token that starts each document, or None if it is one document.
    """
    batches = windows(token_L, model.config.context_length, stride, ROWS, eot)
    scorer = scorer_of(model.config)
    return evaluate(scorer, model.params, batches, model.tokenizer.byte_lengths)
