"""The compiled part of writing: read the rows at once, then add token after token.

Rows are filled up on the right, and slot s of a row's cache holds position s, so rows
do not influence each other. Lengths are rounded up to a few sizes, and every
sampling value is traced: another prompt or temperature compiles nothing anew.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import GPTConfig
from gptjax.model import Params, apply_cached, empty_cache, logits, output_table
from gptjax.sampling import Knobs, log_chance, sample

LEAST_BUCKET = 16
# Passes of XLA that undo `packing.sums_of_row` on a CPU: the first cuts a sum in parts
# and writes all products down, four bytes for each of the kernel; the second takes away
# the barrier that keeps kernels of 8 bits in the loop over tokens.
LEFT_OUT = {"xla_disable_hlo_passes": "tree_reduction_rewriter,cse_barrier_expander"}


class State(NamedTuple):
    """The rows while they grow."""

    token_B: Int[Array, " B"]  # chosen last, not yet in the cache
    length_B: Int[Array, " B"]  # tokens in the cache
    count_B: Int[Array, " B"]  # new tokens so far
    done_B: Bool[Array, " B"]  # a stop token was chosen
    seen_BV: Bool[Array, "B V"]
    ids_BM: Int[Array, "B M"]  # new tokens; [M] is a bucket of max_new_tokens
    logprob_BM: Float[Array, "B M"]
    cache: Any


class Limits(NamedTuple):
    """What one call fixes, as arrays on the device."""

    key_B: Key[Array, " B"]
    knobs: Knobs
    stop_I: Int[Array, " I"]
    most: Int[Array, ""]  # new tokens of a row


def bucket(length: int, most: int | None) -> int:
    """The next power of two or 3/4 of one, from LEAST_BUCKET on, at most `most`."""
    size = max(LEAST_BUCKET, 1 << (length - 1).bit_length())
    if size > LEAST_BUCKET and length <= 3 * size // 4:
        size = 3 * size // 4
    return size if most is None else min(size, most)


def padded(rows: list[list[int]], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up on the right to one bucket, and their lengths."""
    token_BP = np.zeros((len(rows), bucket(max(map(len, rows)), slots)), np.int32)
    for n, row in enumerate(rows):
        token_BP[n, : len(row)] = row
    return token_BP, np.array([len(row) for row in rows], np.int32)


@functools.cache
def programs() -> tuple[Any, Any]:
    """`fill` and `extend_rows`, compiled; the second writes over its state."""
    options = LEFT_OUT if jax.default_backend() == "cpu" else None
    compiled = functools.partial(jax.jit, static_argnums=0, compiler_options=options)
    return compiled(fill), compiled(extend_rows, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one program, not one each
def empty_state(config: GPTConfig, rows: int, slots: int, most: int) -> State:
    """Rows that hold nothing yet."""
    zero_B = jnp.zeros(rows, jnp.int32)
    return State(
        token_B=zero_B,
        length_B=zero_B,
        count_B=zero_B,
        done_B=jnp.zeros(rows, bool),
        seen_BV=jnp.zeros((rows, config.vocab_size), bool),
        ids_BM=jnp.zeros((rows, most), jnp.int32),
        logprob_BM=jnp.zeros((rows, most), jnp.float32),
        cache=empty_cache(config, rows, slots),
    )


def fill(
    config: GPTConfig,
    layers: Params,
    token_BP: Int[Array, "B P"],
    length_B: Int[Array, " B"],
    state: State,
    limits: Limits,
) -> State:
    """Reads the rows into an empty cache and chooses the token after each.

    Rows that have ended are read as well, but get no token.
    """
    rows, width = token_BP.shape
    slot_BP = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (rows, width))
    x_BPD, cache = apply_cached(config, layers, token_BP, slot_BP, state.cache)
    x_BD = x_BPD[jnp.arange(rows), length_B - 1]
    real_BP = slot_BP < length_B[:, None]
    place_B = jnp.arange(rows)[:, None]
    seen_BV = state.seen_BV.at[place_B, token_BP].max(real_BP)
    state = state._replace(length_B=length_B, seen_BV=seen_BV, cache=cache)
    return choose(config, layers, x_BD, state, limits, growing(state, limits))


def extend_rows(
    config: GPTConfig, layers: Params, state: State, limits: Limits, steps: Array
) -> State:
    """Adds up to `steps` tokens to each row that may grow and has room left."""
    slots = state.cache[0].key_BHSK.shape[2]

    def active(state: State) -> Array:
        return growing(state, limits) & (state.length_B < slots)

    def proceed(carry: tuple[State, Array]) -> Array:
        return jnp.any(active(carry[0])) & (carry[1] < steps)

    def step(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, n = carry
        active_B = active(state)
        position_B1 = jnp.minimum(state.length_B, slots - 1)[:, None]
        x_B1D, cache = apply_cached(
            config, layers, state.token_B[:, None], position_B1, state.cache
        )
        length_B = state.length_B + active_B
        state = state._replace(length_B=length_B, cache=cache)
        return choose(config, layers, x_B1D[:, 0], state, limits, active_B), n + 1

    return jax.lax.while_loop(proceed, step, (state, jnp.int32(0)))[0]


def growing(state: State, limits: Limits) -> Bool[Array, " B"]:
    """Rows that have not ended."""
    return ~state.done_B & (state.count_B < limits.most)


def choose(
    config: GPTConfig,
    layers: Params,
    x_BD: Float[Array, "B D"],
    state: State,
    limits: Limits,
    active_B: Bool[Array, " B"],
) -> State:
    """Draws the next token of each active row and notes it."""
    logit_BV = logits(config, output_table(config, layers), x_BD)
    logit_BV = logit_BV[:, : config.vocab_size]
    key_B = jax.vmap(jax.random.fold_in)(limits.key_B, state.count_B)
    token_B = sample(logit_BV, state.seen_BV, key_B, limits.knobs)
    token_B = jnp.where(active_B, token_B, state.token_B)
    row_B = jnp.arange(len(token_B))
    logprob_B = log_chance(logit_BV, token_B)
    stopped_B = active_B & jnp.any(token_B[:, None] == limits.stop_I[None], axis=-1)
    noted_B = active_B & ~stopped_B
    place_B = jnp.where(noted_B, state.count_B, state.ids_BM.shape[1])  # else nowhere
    return state._replace(
        token_B=token_B,
        count_B=state.count_B + noted_B,
        done_B=state.done_B | stopped_B,
        seen_BV=state.seen_BV.at[row_B, token_B].max(active_B),
        ids_BM=state.ids_BM.at[row_B, place_B].set(token_B, mode="drop"),
        logprob_BM=state.logprob_BM.at[row_B, place_B].set(logprob_B, mode="drop"),
    )
