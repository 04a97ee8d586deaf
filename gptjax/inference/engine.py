"""Jitted prefill and decode loop.

Rows are right-padded and slot s of a row's cache holds position s, so rows do not
influence each other. Lengths are rounded up to a few sizes and all sampling parameters
are traced: a new prompt or temperature rarely recompiles.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import GPTConfig
from gptjax.inference.sampling import SamplingParams, log_prob, sample
from gptjax.model.gpt import apply_with_cache, init_cache, lm_logits, unembedding_matrix
from gptjax.tree import Params

MIN_PROMPT_BUCKET = 16
# XLA passes that undo `quantization.int8_matvec` on CPU. The first splits the reduction
# and materializes all products, four bytes per kernel element. The second removes the
# barrier that keeps int8 kernels inside the decode loop.
DISABLED_XLA_PASSES = {"xla_disable_hlo_passes": "tree_reduction_rewriter,cse_barrier_expander"}


class DecodeState(NamedTuple):
    """State of a batch during decoding. M is the bucketed `max_new_tokens`."""

    token_B: Int[Array, " B"]  # last sampled token, not yet in the cache
    length_B: Int[Array, " B"]  # tokens in the cache
    count_B: Int[Array, " B"]  # new tokens so far, without stop tokens
    done_B: Bool[Array, " B"]  # stop token sampled or stop text found
    seen_BV: Bool[Array, "B V"]  # tokens in the prompt or sampled so far
    ids_BM: Int[Array, "B M"]  # new tokens
    logprob_BM: Float[Array, "B M"]
    cache: Any


class DecodeArgs(NamedTuple):
    """Arguments that are constant during one call, as device arrays."""

    key_B: Key[Array, " B"]
    sampling: SamplingParams
    stop_id_I: Int[Array, " I"]  # stop token ids, padded with -1
    max_new_tokens: Int[Array, ""]  # maximum number of new tokens per row


def bucket_length(length: int, max_length: int | None) -> int:
    """Rounds a length up to a power of two or 3/4 of one, within the limits."""
    size = max(MIN_PROMPT_BUCKET, 1 << (length - 1).bit_length())
    if size > MIN_PROMPT_BUCKET and length <= 3 * size // 4:
        size = 3 * size // 4
    return size if max_length is None else min(size, max_length)


def pad_prompts(rows: list[list[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads rows to a common bucket length; returns them and their lengths."""
    token_BP = np.zeros((len(rows), bucket_length(max(map(len, rows)), max_length)), np.int32)
    for n, row in enumerate(rows):
        token_BP[n, : len(row)] = row
    return token_BP, np.array([len(row) for row in rows], np.int32)


@functools.cache
def jitted_steps() -> tuple[Any, Any]:
    """Returns jitted `prefill` and `decode_loop`; the latter donates its state."""
    options = DISABLED_XLA_PASSES if jax.default_backend() == "cpu" else None
    jit = functools.partial(jax.jit, static_argnums=0, compiler_options=options)
    return jit(prefill), jit(decode_loop, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one program for all arrays
def init_decode_state(
    config: GPTConfig, rows: int, cache_length: int, max_new_tokens: int
) -> DecodeState:
    """Creates the decode state with empty sequences."""
    zero_B = jnp.zeros(rows, jnp.int32)
    return DecodeState(
        token_B=zero_B,
        length_B=zero_B,
        count_B=zero_B,
        done_B=jnp.zeros(rows, bool),
        seen_BV=jnp.zeros((rows, config.vocab_size), bool),
        ids_BM=jnp.zeros((rows, max_new_tokens), jnp.int32),
        logprob_BM=jnp.zeros((rows, max_new_tokens), jnp.float32),
        cache=init_cache(config, rows, cache_length),
    )


def prefill(
    config: GPTConfig,
    decode_params: Params,
    token_BP: Int[Array, "B P"],
    length_B: Int[Array, " B"],
    state: DecodeState,
    args: DecodeArgs,
) -> DecodeState:
    """Prefill: fills the KV cache and samples the first token of unfinished rows."""
    rows, width = token_BP.shape
    position_BP = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (rows, width))
    x_BPD, cache = apply_with_cache(config, decode_params, token_BP, position_BP, state.cache)
    x_BD = x_BPD[jnp.arange(rows), length_B - 1]
    valid_BP = position_BP < length_B[:, None]
    row_B = jnp.arange(rows)[:, None]
    seen_BV = state.seen_BV.at[row_B, token_BP].max(valid_BP)
    state = state._replace(length_B=length_B, seen_BV=seen_BV, cache=cache)
    return sample_and_append(config, decode_params, x_BD, state, args, active_rows(state, args))


def decode_loop(
    config: GPTConfig, decode_params: Params, state: DecodeState, args: DecodeArgs, max_steps: Array
) -> DecodeState:
    """Decodes up to `max_steps` tokens for each active row with space in its cache."""
    cache_length = state.cache[0].key_BGSK.shape[2]

    def rows_to_decode(state: DecodeState) -> Array:
        return active_rows(state, args) & (state.length_B < cache_length)

    def should_continue(carry: tuple[DecodeState, Array]) -> Array:
        return jnp.any(rows_to_decode(carry[0])) & (carry[1] < max_steps)

    def decode_step(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, n = carry
        active_B = rows_to_decode(state)
        position_B1 = jnp.minimum(state.length_B, cache_length - 1)[:, None]
        x_B1D, cache = apply_with_cache(
            config, decode_params, state.token_B[:, None], position_B1, state.cache
        )
        length_B = state.length_B + active_B
        state = state._replace(length_B=length_B, cache=cache)
        return sample_and_append(config, decode_params, x_B1D[:, 0], state, args, active_B), n + 1

    return jax.lax.while_loop(should_continue, decode_step, (state, jnp.int32(0)))[0]


def active_rows(state: DecodeState, args: DecodeArgs) -> Bool[Array, " B"]:
    """Mask of rows that are neither stopped nor at the token limit."""
    return ~state.done_B & (state.count_B < args.max_new_tokens)


def sample_and_append(
    config: GPTConfig,
    decode_params: Params,
    x_BD: Float[Array, "B D"],
    state: DecodeState,
    args: DecodeArgs,
    active_B: Bool[Array, " B"],
) -> DecodeState:
    """Samples and appends one token per active sequence."""
    logit_BV = lm_logits(config, unembedding_matrix(config, decode_params), x_BD)
    logit_BV = logit_BV[:, : config.vocab_size]
    key_B = jax.vmap(jax.random.fold_in)(args.key_B, state.count_B)
    token_B = sample(logit_BV, state.seen_BV, key_B, args.sampling)
    token_B = jnp.where(active_B, token_B, state.token_B)
    row_B = jnp.arange(len(token_B))
    logprob_B = log_prob(logit_BV, token_B)
    # Of non-finite logits: the token is appended, as its log probability tells.
    is_stop_B = jnp.any(token_B[:, None] == args.stop_id_I[None], axis=-1)
    stopped_B = active_B & is_stop_B & ~jnp.isnan(logprob_B)
    appended_B = active_B & ~stopped_B
    index_B = jnp.where(appended_B, state.count_B, state.ids_BM.shape[1])  # M: dropped
    return state._replace(
        token_B=token_B,
        count_B=state.count_B + appended_B,
        done_B=state.done_B | stopped_B,
        seen_BV=state.seen_BV.at[row_B, token_B].max(active_B),
        ids_BM=state.ids_BM.at[row_B, index_B].set(token_B, mode="drop"),
        logprob_BM=state.logprob_BM.at[row_B, index_B].set(logprob_B, mode="drop"),
    )
