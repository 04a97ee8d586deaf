"""Loss, perplexity and bits per byte on text; every token is scored once."""

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
from gptjax.data.lm import Batch, make_lm_batch
from gptjax.errors import ConfigError, DataError, check_type
from gptjax.inference.generate import check_language_model
from gptjax.parallel.sharding import replicate, shard_batch, use_mesh
from gptjax.runtime.preemption import check_interrupted
from gptjax.runtime.timing import log_progress
from gptjax.training.loss import batch_per_token_loss
from gptjax.tree import Params
from gptjax.weights.model_folder import Model

# Per batch of `score`: windows, and tokens if that is more than one window.
MAX_SCORE_WINDOWS, MAX_SCORE_TOKENS = 8, 8192
EVAL_CHUNK_SIZE = 256  # positions whose logits are in memory at a time

EvalStep = Callable[[Params, Any], Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Language model evaluation on a text."""

    loss: float  # nats per token
    tokens: int  # scored
    bytes: int  # of the text of the scored tokens
    total_loss: float  # sum over tokens, nats

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; not comparable across tokenizers."""
        return to_perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, comparable across tokenizers; None without bytes."""
        return self.total_loss / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Values logged to metrics.jsonl."""
        names = ("loss", "perplexity", "bits_per_byte", "tokens")
        return {name: getattr(self, name) for name in names}


def to_perplexity(loss: float) -> float:
    """Exponential of a loss, which is clipped so that the result is finite."""
    return math.exp(min(loss, 700.0))


def make_eval_step(
    config: GPTConfig, chunk_size: int = EVAL_CHUNK_SIZE, mesh: Mesh | None = None
) -> EvalStep:
    """Returns a jitted function (params, batch) -> loss [B, T] in nats.

    Logits are computed for `chunk_size` positions at a time; `mesh` is that of sharded
    parameters.
    """

    @jax.jit
    def compute_losses(params: Params, batch: Any) -> Any:
        return replicate(batch_per_token_loss(config, params, batch, chunk_size=chunk_size))

    def eval_step(params: Params, batch: Any) -> Any:
        with use_mesh(mesh):
            return compute_losses(params, shard_batch(batch, mesh, len(batch["tokens"])))

    return eval_step


# Cached, so that a notebook that scores many texts compiles once.
eval_step_for = functools.lru_cache(maxsize=4)(make_eval_step)


def evaluate(
    eval_step: EvalStep, params: Params, batches: Iterable[Batch], byte_lengths: np.ndarray
) -> Evaluation:
    """Evaluates the targets with a weight above 0; sums in float64 on the host."""
    total_loss, num_tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
        check_interrupted()
        mask = batch["loss_weights"] > 0
        total_loss += float(np.sum(np.asarray(eval_step(params, batch), np.float64)[mask]))
        num_tokens += int(mask.sum())
        num_bytes += int(byte_lengths[batch["targets"][mask]].sum())
    if not num_tokens:
        raise DataError("there is no token to score. Pass a non-empty text.")
    return Evaluation(total_loss / num_tokens, num_tokens, num_bytes, total_loss)


def sliding_windows(
    token_L: np.ndarray, context_length: int, stride: int, batch_size: int, eot_token: int | None
) -> Iterator[Batch]:
    """Yields batches of overlapping windows that score each token but the first once.

    The first window scores all its targets, later ones the last `stride`. The last
    batch is padded with rows of weight 0.
    """
    num_targets = len(token_L) - 1
    num_windows = 1 + max(0, -(-(num_targets - context_length) // stride))
    padded = np.zeros(context_length + 1 + (num_windows + batch_size) * stride, np.int32)
    padded[: len(token_L)] = token_L
    starts = range(0, num_windows, batch_size)
    for first_window in log_progress(starts, len(starts), "scoring", "batches"):
        start_B = (first_window + np.arange(batch_size)) * stride
        tokens = padded[start_B[:, None] + np.arange(context_length + 1)]
        batch, position_T = make_lm_batch(tokens, eot_token), np.arange(context_length)
        is_scored_BT = (position_T >= context_length - stride) | (start_B[:, None] == 0)
        is_scored_BT &= start_B[:, None] + position_T < num_targets
        batch["loss_weights"] = is_scored_BT.astype(np.float32)
        yield batch


def score(
    model: Model, text: str, *, context: int | None = None, stride: int | None = None
) -> Evaluation:
    """Evaluates the model on `text` as one document.

    `context` is the number of tokens of a window, by default the context length;
    `stride` that between the starts of two windows, by default `context`, which is
    fastest; smaller values give each token more context.
    """
    check_language_model(model)
    context = model.config.context_length if context is None else context
    stride = context if stride is None else stride
    limits = {"context": model.config.context_length, "stride": context}
    for name, value in (("context", context), ("stride", stride)):
        check_type(name, value, int, "Pass a number of tokens.")
        if not 1 <= value <= limits[name]:
            raise ConfigError(f"--{name} {value} must be from 1 to {limits[name]} tokens.")
    token_L = np.array(start_ids(model) + model.tokenizer.encode(text), np.int32)
    return score_tokens(model, token_L, stride, None, context)


def start_ids(model: Model) -> list[int]:
    """Tokens before a text: those that the model expects, or the end of another."""
    return model.tokenizer.prefix_ids or [model.tokenizer.eot_token]


def token_losses(model: Model, text: str) -> tuple[list[int], Float32[np.ndarray, " L"]]:
    """Returns the tokens of `text` and the loss of each in nats.

    `score` is their mean. The text has 1 to `context_length` tokens.
    """
    check_language_model(model)
    context_length, ids = model.config.context_length, model.tokenizer.encode(text)
    if not 1 <= len(ids) <= context_length:
        raise ConfigError(
            f"the text has {len(ids)} tokens. Pass 1 to {context_length} tokens, or use "
            "gptjax.score for the mean loss."
        )
    token_L = np.array(start_ids(model) + ids, np.int32)
    (batch,) = sliding_windows(token_L, context_length, context_length, 1, None)
    loss_BT = np.asarray(eval_step_for(model.config)(model.params, batch), np.float32)
    return ids, loss_BT[0, : len(ids)]


def score_batch_size(context: int) -> int:
    """Number of windows that are scored together."""
    return min(max(1, MAX_SCORE_TOKENS // context), MAX_SCORE_WINDOWS)


def score_tokens(
    model: Model,
    token_L: np.ndarray,
    stride: int,
    eot_token: int | None,
    context: int | None = None,
) -> Evaluation:
    """Evaluates the model on tokens, of which the first is only an input.

    `eot_token` starts each document; None means a single document. `context` is that of
    `score`.
    """
    context = model.config.context_length if context is None else context
    batches = sliding_windows(token_L, context, stride, score_batch_size(context), eot_token)
    eval_step = eval_step_for(model.config)
    return evaluate(eval_step, model.params, batches, model.tokenizer.byte_lengths)
