"""The formula a block at a time: O(T) memory, forward and backward, on any platform.

The softmax of a row is kept as its largest score and the sum of exponentials below
it (Milakov and Gimelshein 2018); backward makes the weights again from the two (Dao
et al. 2022, "FlashAttention"; the order of the loops is that of Dao 2023).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax.attention.call import Call, cannot_drop
from gptjax.attention.parts import by_parts
from gptjax.attention.sight import MIXED, Heads, KeyHeads, Sight, seen, slots

LEAST = jnp.finfo(jnp.float32).min
BLOCK = 256  # queries, and keys, at a time; the fastest on a CPU, of powers of 2

Rows = Float[Array, "B H T K"]
KeyRows = Float[Array, "B H S K"]


class Grid(NamedTuple):
    """How queries and keys are cut into blocks; all of it known when tracing."""

    sight: Sight  # only its numbers
    own: bool  # whether query t is at key t: then whole blocks are hidden
    keys: int  # how many there are; what is beyond them fills the last block
    block_T: int
    block_S: int


class Places(NamedTuple):
    """Where the queries stand, and whose they are."""

    slot_BT: Int[Array, "B T"]
    segment_BT: Int[Array, "B T"] | None


def blockwise(
    query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
) -> Heads:
    """The same sum, from blocks of scores that are forgotten at once."""
    return by_parts(part, query_BTHK, key_BSHK, value_BSHK, sight)


def part(
    query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
) -> Heads:
    """One device's rows and heads."""
    queries, keys = query_BTHK.shape[1], key_BSHK.shape[1]
    block_T, block_S = min(BLOCK, queries), min(BLOCK, keys)
    numbers = Sight(causal=sight.causal, window=sight.window)
    grid = Grid(numbers, sight.slot_BT is None, keys, block_T, block_S)
    places = Places(slots(sight, query_BTHK), sight.segment_BT)
    mixed_BHTK = mixed(
        grid,
        filled(jnp.swapaxes(query_BTHK, 1, 2), 2, block_T),
        filled(jnp.swapaxes(key_BSHK, 1, 2), 2, block_S),
        filled(jnp.swapaxes(value_BSHK, 1, 2), 2, block_S),
        jax.tree.map(lambda place_BT: filled(place_BT, 1, block_T), places),
    )
    return jnp.swapaxes(mixed_BHTK[:, :, :queries], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixed(
    grid: Grid, query_BHTK: Rows, key_BHSK: KeyRows, value_BHSK: KeyRows, places: Places
) -> Rows:
    """The output for whole blocks."""
    return forward(grid, query_BHTK, key_BHSK, value_BHSK, places)[0]


def forward(
    grid: Grid, query_BHTK: Rows, key_BHSK: KeyRows, value_BHSK: KeyRows, places: Places
) -> tuple[Rows, Any]:
    """The output, and what backward needs: besides the arguments, O(T)."""

    def row(i: Array) -> tuple[Array, Array]:
        block_BHTK = cut(query_BHTK, 2, i, grid.block_T)

        def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            most_BHT, sum_BHT, mixed_BHTK = carry
            block_BHSK = cut(key_BHSK, 2, j, grid.block_S)
            score_BHTS = scores(grid, block_BHTK, block_BHSK, places, i, j)
            higher_BHT = jnp.maximum(most_BHT, jnp.max(score_BHTS, -1))
            shrink_BHT = jnp.exp(most_BHT - higher_BHT)
            weight_BHTS = jnp.exp(score_BHTS - higher_BHT[..., None])
            more_BHTK = jnp.einsum(
                "BHTS,BHSK->BHTK",
                weight_BHTS.astype(value_BHSK.dtype),
                cut(value_BHSK, 2, j, grid.block_S),
                preferred_element_type=jnp.float32,
            )
            return (
                higher_BHT,
                shrink_BHT * sum_BHT + jnp.sum(weight_BHTS, -1),
                shrink_BHT[..., None] * mixed_BHTK + more_BHTK,
            )

        # A row starts with all of its keys hidden: where a block hides them too, its
        # weights are wrong, and the first visible key shrinks them to exactly 0.
        start_BHT = jnp.full(block_BHTK.shape[:3], LEAST)
        start = (
            start_BHT,
            jnp.zeros_like(start_BHT),
            jnp.zeros(block_BHTK.shape, jnp.float32),
        )
        first, last = reach(grid, i, key_BHSK.shape[2] // grid.block_S)
        most_BHT, sum_BHT, mixed_BHTK = lax.fori_loop(first, last, step, start)
        mixed_BHTK = (mixed_BHTK / sum_BHT[..., None]).astype(query_BHTK.dtype)
        return mixed_BHTK, most_BHT + jnp.log(sum_BHT)

    blocks = jnp.arange(query_BHTK.shape[2] // grid.block_T)
    named = functools.partial(checkpoint_name, name=MIXED)
    mixed_BHTK, log_sum_BHT = map(named, map(joined, lax.map(row, blocks)))
    kept = (query_BHTK, key_BHSK, value_BHSK, places, mixed_BHTK, log_sum_BHT)
    return mixed_BHTK, kept


def backward(grid: Grid, kept: Any, slope_BHTK: Rows) -> tuple[Any, ...]:
    """Slopes of queries, keys and values, from those of the output."""
    query_BHTK, key_BHSK, value_BHSK, places, mixed_BHTK, log_sum_BHT = kept
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # What all weights of a row have in common: they sum to 1.
    common_BHT = einsum("BHTK,BHTK->BHT", slope_BHTK, mixed_BHTK)

    def column(query_slope_BHTK: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        block_BHSK = cut(key_BHSK, 2, j, grid.block_S)
        values_BHSK = cut(value_BHSK, 2, j, grid.block_S)

        def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            query_slope_BHTK, key_slope_BHSK, value_slope_BHSK = carry
            some_BHTK, slopes_BHTK, logs_BHT, commons_BHT = (
                cut(x, 2, i, grid.block_T)
                for x in (query_BHTK, slope_BHTK, log_sum_BHT, common_BHT)
            )
            score_BHTS = scores(grid, some_BHTK, block_BHSK, places, i, j)
            weight_BHTS = jnp.exp(score_BHTS - logs_BHT[..., None])
            value_slope_BHSK += einsum(
                "BHTS,BHTK->BHSK", weight_BHTS.astype(slope_BHTK.dtype), slopes_BHTK
            )
            change_BHTS = einsum("BHTK,BHSK->BHTS", slopes_BHTK, values_BHSK)
            change_BHTS = weight_BHTS * (change_BHTS - commons_BHT[..., None])
            change_BHTS = (change_BHTS * scale(query_BHTK)).astype(query_BHTK.dtype)
            key_slope_BHSK += einsum("BHTS,BHTK->BHSK", change_BHTS, some_BHTK)
            more_BHTK = einsum("BHTS,BHSK->BHTK", change_BHTS, block_BHSK)
            more_BHTK += cut(query_slope_BHTK, 2, i, grid.block_T)
            query_slope_BHTK = lax.dynamic_update_slice_in_dim(
                query_slope_BHTK, more_BHTK, i * grid.block_T, 2
            )
            return query_slope_BHTK, key_slope_BHSK, value_slope_BHSK

        zeros_BHSK = jnp.zeros(block_BHSK.shape, jnp.float32)
        first, last = reach_back(grid, j, query_BHTK.shape[2] // grid.block_T)
        query_slope_BHTK, *slopes = lax.fori_loop(
            first, last, step, (query_slope_BHTK, zeros_BHSK, zeros_BHSK)
        )
        return query_slope_BHTK, tuple(x.astype(key_BHSK.dtype) for x in slopes)

    zeros_BHTK = jnp.zeros(query_BHTK.shape, jnp.float32)
    blocks = jnp.arange(key_BHSK.shape[2] // grid.block_S)
    query_slope_BHTK, slopes = lax.scan(column, zeros_BHTK, blocks)
    return query_slope_BHTK.astype(query_BHTK.dtype), *map(joined, slopes), None


mixed.defvjp(forward, backward)


def scores(
    grid: Grid,
    query_BHTK: Rows,
    key_BHSK: KeyRows,
    places: Places,
    i: Int[Array, ""],
    j: Int[Array, ""],
) -> Float[Array, "B H T S"]:
    """Those of block i of the queries and block j of the keys, least where hidden."""
    score_BHTS = jnp.einsum(
        "BHTK,BHSK->BHTS", query_BHTK, key_BHSK, preferred_element_type=jnp.float32
    )
    slot_S = j * grid.block_S + jnp.arange(grid.block_S)
    slot_BT, segment_BT = jax.tree.map(
        lambda place_BT: cut(place_BT, 1, i, grid.block_T), places
    )
    segment_BS = None
    if places.segment_BT is not None:
        segment_BS = cut(places.segment_BT, 1, j, grid.block_S)
    mask_BTS = seen(grid.sight, slot_BT, slot_S, segment_BT, segment_BS)
    mask_BTS &= (slot_S < grid.keys)[None, None]
    return jnp.where(mask_BTS[:, None], score_BHTS * scale(query_BHTK), LEAST)


def reach(grid: Grid, i: Array, blocks: int) -> tuple[Any, Any]:
    """The blocks of keys, from the first to before the last, that block i may see."""
    first, last = 0, blocks
    if grid.own and grid.sight.causal:
        last = i + 1
    if grid.own and grid.sight.window is not None:
        first = jnp.maximum(
            0, (i * grid.block_T - grid.sight.window + 1) // grid.block_S
        )
    return first, last


def reach_back(grid: Grid, j: Array, blocks: int) -> tuple[Any, Any]:
    """The blocks of queries that may see a key of block j."""
    first, last = 0, blocks
    if grid.own and grid.sight.causal:
        first = j
    if grid.own and grid.sight.window is not None:
        furthest = (j + 1) * grid.block_S - 2 + grid.sight.window
        last = jnp.minimum(blocks, furthest // grid.block_T + 1)
    return first, last


def scale(query: Float[Array, "*B K"]) -> float:
    """What scores are multiplied by, so that their size does not grow with K."""
    return query.shape[-1] ** -0.5


def cut(x: Array, axis: int, n: Array, size: int) -> Array:
    """Block n of an axis."""
    return lax.dynamic_slice_in_dim(x, n * size, size, axis)


def filled(x: Array, axis: int, size: int) -> Array:
    """The array with zeros after it, up to a whole number of blocks."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, width)


def joined(x: Float[Array, "n B H T *K"]) -> Float[Array, "B H nT *K"]:
    """Blocks, one after the other, as one axis again."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def obstacle(call: Call) -> str:
    """Why this backend cannot answer, or nothing."""
    return cannot_drop("blockwise") if call.dropout else ""
