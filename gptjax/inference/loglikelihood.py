"""Log-likelihoods of continuations, for benchmarks.

The prefill of a context is shared by its continuations: its last position predicts
their first tokens, and the others attend to copies of its KV cache. Contexts and
continuations are right-padded to a few bucket lengths, so that few programs are
compiled.

Letters besides those of `gptjax.model.gpt`: here, [C] is the continuations of a
context, [R] those of all contexts, [P] the padded positions of a context, [T] the
padded tokens of a continuation, [M] the positions whose logits are in memory together.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.config import GPTConfig
from gptjax.errors import DataError, ModelError
from gptjax.inference.engine import bucket_length, pad_prompts
from gptjax.inference.generate import check_language_model, check_token_ids, warn_truncated
from gptjax.inference.sampling import argmax, log_prob
from gptjax.model.gpt import apply_with_cache, init_cache, lm_logits, unembedding_matrix
from gptjax.runtime.preemption import check_interrupted
from gptjax.runtime.timing import log_progress
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.tree import Params
from gptjax.weights.model_folder import Model

MIN_CONTINUATION_BUCKET = 8  # above 1, which needs no second pass
MAX_CONTINUATIONS = 64  # of a context, per batch
MAX_BATCH_TOKENS = 8192  # slots of all KV caches of a batch, unless it has one context
LOGIT_CHUNK_SIZE = 256  # positions whose logits are in memory at a time


class ScoringRequest(NamedTuple):
    """Context and continuations as token ids; each has at least one."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class ContinuationScore(NamedTuple):
    """Log-likelihood of a continuation."""

    logprob: float  # of all its tokens given the context, in nats
    is_greedy: bool  # whether greedy decoding of the context generates it


class SharedContext(NamedTuple):
    """Context with the continuations that share its prefill."""

    ids: tuple[int, ...]
    continuations: list[Sequence[int]]
    origins: list[tuple[int, int]]  # index of the request, and of the continuation in it


class ScoringBatch(NamedTuple):
    """Contexts padded to one length, and to a batch by copies of the last one."""

    contexts: list[SharedContext]
    context_BP: Int[np.ndarray, "B P"]
    length_B: Int[np.ndarray, " B"]  # tokens of each context
    target_BCT: Int[np.ndarray, "B C T"]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, special: Collection[str] = ()
) -> tuple[list[int], list[int]]:
    """Encodes a context and its continuation like lm-evaluation-harness 0.4.13.

    Blanks at the end of the context belong to the continuation. Both are encoded
    together, then cut after as many tokens as the context alone has. A continuation
    that is left without tokens, since one spans the cut, is encoded alone (as proposed
    in EleutherAI/lm-evaluation-harness#4055). In place of an empty context is the
    token that starts a text, or else the one that ends it.

    `special` are special tokens that the texts may contain, as chat templates do.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        start = tokenizer.eot_token if tokenizer.bos_token is None else tokenizer.bos_token
        return [start], tokenizer.encode(continuation, special)
    context_ids = encode_start(tokenizer, stripped, special)
    ids = encode_start(tokenizer, stripped + continuation, special)
    return context_ids, ids[len(context_ids) :] or tokenizer.encode(continuation, special)


def encode_start(tokenizer: Tokenizer, text: str, special: Collection[str] = ()) -> list[int]:
    """Encodes the start of a text, with the BOS token once if the model expects it."""
    prefix, ids = tokenizer.prefix_ids, tokenizer.encode(text, special)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def score_continuations(
    model: Model, requests: Sequence[ScoringRequest]
) -> list[list[ContinuationScore]]:
    """Scores the continuations of each request, in the order of the arguments.

    A context that does not fit the context length together with a continuation loses
    its first tokens for it. Equal contexts, also of different requests, are processed
    once.
    """
    check_language_model(model)
    scores: list[list[Any]] = [[None] * len(request.continuations) for request in requests]
    batches = make_batches(share_contexts(model, requests), model.config.context_length)
    for contexts, *arrays in log_progress(batches, len(batches), "scoring", "batches"):
        check_interrupted()
        outputs = score_batch(model.config, model.decode_params, *arrays)
        logprob_BCT, is_greedy_BCT = map(np.asarray, outputs)
        for row, context in enumerate(contexts):
            for column, (request, position) in enumerate(context.origins):
                tokens = row, column, slice(len(context.continuations[column]))
                scores[request][position] = ContinuationScore(
                    sum_logprobs(logprob_BCT[tokens]), bool(is_greedy_BCT[tokens].all())
                )
    return scores


def sum_logprobs(logprob_T: Float[np.ndarray, " T"]) -> float:
    """Sums log-probabilities in float64; they must be numbers."""
    total = float(logprob_T.sum(dtype=np.float64))
    if np.isnan(total):
        raise ModelError(
            "the logits of the model are not finite. Load or save its parameters again, or "
            "retrain it."
        )
    return total


def share_contexts(model: Model, requests: Sequence[ScoringRequest]) -> list[SharedContext]:
    """Truncates contexts on the left and groups the continuations of equal ones."""
    max_length, grouped, rows = model.config.context_length, defaultdict(list), []
    for n, (context, continuations) in enumerate(requests):
        check_token_ids(model, itertools.chain(context, *continuations), "of a request")
        for m, continuation in enumerate(continuations):
            if not context or not 0 < len(continuation) <= max_length:
                raise DataError(
                    f"{len(continuation)} tokens after {len(context)} cannot be scored: the "
                    "context needs at least one token, and the continuation 1 to the model's "
                    f"{max_length:,}. Shorten or extend them."
                )
            rows.append([*context, *continuation[:-1]])  # the last token is only a target
            surplus = max(0, len(rows[-1]) - max_length)
            grouped[tuple(context[surplus:])].append((continuation, (n, m)))
    warn_truncated(rows, max_length, "contexts with a continuation", "first")
    return [
        SharedContext(ids, *map(list, zip(*items[start : start + MAX_CONTINUATIONS], strict=True)))
        for ids, items in grouped.items()
        for start in range(0, len(items), MAX_CONTINUATIONS)
    ]


class BatchShape(NamedTuple):
    """Padded sizes of the contexts of a batch and of their continuations."""

    context_length: int  # [P]
    num_targets: int  # [T]
    num_continuations: int  # [C]

    def count_slots(self, rows: int) -> int:
        """Positions in the KV caches of a batch of `rows` contexts."""
        copies = self.num_continuations * (self.num_targets > 1)
        slots = self.context_length + copies * (self.context_length + self.num_targets)
        return power_of_two(rows) * slots


def make_batches(contexts: Iterable[SharedContext], max_length: int) -> list[ScoringBatch]:
    """Batches contexts of similar lengths, those that need most memory first."""
    batches, members, shape = [], [], BatchShape(0, 0, 0)
    shapes = [(bucket_shape(context, max_length), context) for context in contexts]
    for bucket, context in sorted(shapes, key=lambda item: item[0], reverse=True):
        merged = BatchShape(*map(max, shape, bucket))
        if members and merged.count_slots(len(members) + 1) > MAX_BATCH_TOKENS:
            batches.append(pad_batch(members, shape))
            members, merged = [], bucket
        members.append(context)
        shape = merged
    return [*batches, pad_batch(members, shape)] if members else batches


def bucket_shape(context: SharedContext, max_length: int) -> BatchShape:
    """Rounds the sizes of a context up."""
    longest = max(map(len, context.continuations))
    num_targets = max(MIN_CONTINUATION_BUCKET, power_of_two(longest)) if longest > 1 else 1
    width = bucket_length(len(context.ids), max_length)
    return BatchShape(width, num_targets, len(context.continuations))


def power_of_two(number: int) -> int:
    """Rounds up to a power of two."""
    return 1 << (number - 1).bit_length()


def pad_batch(contexts: list[SharedContext], shape: BatchShape) -> ScoringBatch:
    """Pads contexts and continuations to a shape, and the batch to a power of two."""
    rows = power_of_two(len(contexts))
    target_BCT = np.zeros((rows, shape.num_continuations, shape.num_targets), np.int32)
    for row, context in enumerate(contexts):
        for column, ids in enumerate(context.continuations):
            target_BCT[row, column, : len(ids)] = ids
    prompts = [list(context.ids) for context in contexts]
    prompts += prompts[-1:] * (rows - len(contexts))
    return ScoringBatch(contexts, *pad_prompts(prompts, shape.context_length), target_BCT)


@functools.partial(jax.jit, static_argnums=0)
def score_batch(
    config: GPTConfig,
    decode_params: Params,
    context_BP: Int[Array, "B P"],
    length_B: Int[Array, " B"],
    target_BCT: Int[Array, "B C T"],
) -> tuple[Float[Array, "B C T"], Bool[Array, "B C T"]]:
    """Computes the log-probability of each target, and whether it is the argmax."""
    (rows, width), (_, continuations, num_targets) = context_BP.shape, target_BCT.shape
    cache = init_cache(config, rows, width + num_targets - 1)
    position_BP = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], context_BP.shape)
    x_BPD, cache = apply_with_cache(config, decode_params, context_BP, position_BP, cache)
    x_B1D = x_BPD[jnp.arange(rows), length_B - 1][:, None]
    repeat = functools.partial(jnp.repeat, repeats=continuations, axis=0)
    x_RTD = repeat(x_B1D)
    if num_targets > 1:
        token_RT = target_BCT.reshape(-1, num_targets)[:, :-1]
        position_RT = repeat(length_B)[:, None] + jnp.arange(num_targets - 1)[None]
        # Of padding only: beyond the context length there is no position embedding.
        position_RT = jnp.minimum(position_RT, config.context_length - 1)
        cache = jax.tree.map(repeat, cache)
        next_RTD, _ = apply_with_cache(config, decode_params, token_RT, position_RT, cache)
        x_RTD = jnp.concatenate([x_RTD, next_RTD], axis=1)
    return score_targets(config, decode_params, x_RTD, target_BCT)


def score_targets(
    config: GPTConfig,
    decode_params: Params,
    x_RTD: Float[Array, "R T D"],
    target_BCT: Int[Array, "B C T"],
) -> tuple[Array, Array]:
    """Returns the two results of `score_batch`, in chunks of positions."""
    unembedding_VD = unembedding_matrix(config, decode_params)
    chunk_size = min(LOGIT_CHUNK_SIZE, target_BCT.size)

    def score_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        x_MD, target_M = chunk
        logit_MV = lm_logits(config, unembedding_VD, x_MD)[:, : config.vocab_size]
        return log_prob(logit_MV, target_M), argmax(logit_MV) == target_M

    padding = -target_BCT.size % chunk_size
    x_flat = jnp.pad(x_RTD.reshape(-1, x_RTD.shape[-1]), ((0, padding), (0, 0)))
    target = jnp.pad(target_BCT.reshape(-1), (0, padding)).reshape(-1, chunk_size)
    chunks = x_flat.reshape(*target.shape, -1), target
    logprob, is_greedy = (
        score.reshape(-1)[: target_BCT.size].reshape(target_BCT.shape)
        for score in jax.lax.map(score_chunk, chunks)
    )
    return logprob, is_greedy
