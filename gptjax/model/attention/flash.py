"""Flash attention in plain JAX: O(T) memory forward and backward, on any platform.

Forward is an online softmax over blocks of keys, with a running maximum and a running
sum per query (Milakov and Gimelshein 2018). Backward recomputes the weights of a block
as exp(score - lse) from the saved log-sum-exp (Dao et al. 2022, "FlashAttention", sec.
3.1). The loop order is that of FlashAttention-2 (Dao 2023, algorithms 1 and 2): outer
loop over query blocks forward, over key blocks backward.

In forward and backward, i is the index of a query block and j of a key block; arrays
named `block_...` hold one block of them, with T and S of the block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax.model.attention.mask import (
    ATTN_OUT,
    AttentionMask,
    KeysHeadsFirst,
    KeyValueHeads,
    QueriesHeadsFirst,
    QueryHeads,
    make_attention_mask,
    query_positions,
)

MASK_VALUE = jnp.finfo(jnp.float32).min
FLASH_BLOCK_SIZE = 256  # queries or keys; the fastest power of 2 on CPU


class BlockLayout(NamedTuple):
    """Static block layout: how queries and keys are divided into blocks."""

    causal: bool
    skips_masked: bool  # causal, and query t is at key t
    num_keys: int  # number of keys without padding of the last block
    query_block_size: int
    key_block_size: int


class QueryInfo(NamedTuple):
    """Query positions and segment ids."""

    query_position_BT: Int[Array, "B T"]
    segment_id_BT: Int[Array, "B T"] | None


def flash_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention by a blockwise softmax; scores are never stored."""
    queries, keys = query_BTHK.shape[1], key_BSHK.shape[1]
    query_size, key_size = min(FLASH_BLOCK_SIZE, queries), min(FLASH_BLOCK_SIZE, keys)
    skips_masked = mask.causal and mask.query_position_BT is None
    layout = BlockLayout(mask.causal, skips_masked, keys, query_size, key_size)
    query_info = QueryInfo(query_positions(mask, query_BTHK), mask.segment_id_BT)
    out_BHTK = _flash_attention(
        layout,
        *(
            pad_to_multiple(jnp.swapaxes(x, 1, 2), 2, size)
            for x, size in ((query_BTHK, query_size), (key_BSHK, key_size), (value_BSHK, key_size))
        ),
        jax.tree.map(lambda x_BT: pad_to_multiple(x_BT, 1, query_size), query_info),
    )
    return jnp.swapaxes(out_BHTK[:, :, :queries], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash_attention(layout: BlockLayout, *arrays: Any) -> QueriesHeadsFirst:
    """Computes attention for lengths that are multiples of the block sizes."""
    return _fwd(layout, *arrays)[0]


def _fwd(
    layout: BlockLayout,
    query_BHTK: QueriesHeadsFirst,
    key_BHSK: KeysHeadsFirst,
    value_BHSK: KeysHeadsFirst,
    query_info: QueryInfo,
) -> tuple[QueriesHeadsFirst, Any]:
    """Returns the output, and as residuals the arguments, the output and O(T) lse."""

    def attend_query_block(i: Array) -> tuple[Array, Array]:
        block_query_BHTK = slice_block(query_BHTK, 2, i, layout.query_block_size)

        def attend_key_block(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            max_BHT, sum_BHT, out_BHTK = carry
            block_key_BHSK = slice_block(key_BHSK, 2, j, layout.key_block_size)
            score_BHTS = block_scores(layout, block_query_BHTK, block_key_BHSK, query_info, i, j)
            new_max_BHT = jnp.maximum(max_BHT, jnp.max(score_BHTS, -1))
            rescale_BHT = jnp.exp(max_BHT - new_max_BHT)
            weight_BHTS = jnp.exp(score_BHTS - new_max_BHT[..., None])
            block_out_BHTK = jnp.einsum(
                "BHTS,BHSK->BHTK",
                weight_BHTS.astype(value_BHSK.dtype),
                slice_block(value_BHSK, 2, j, layout.key_block_size),
                preferred_element_type=jnp.float32,
            )
            return (
                new_max_BHT,
                rescale_BHT * sum_BHT + jnp.sum(weight_BHTS, -1),
                rescale_BHT[..., None] * out_BHTK + block_out_BHTK,
            )

        # While all keys of a row are masked, its maximum is MASK_VALUE and its weights
        # are wrong (1 instead of 0); the first unmasked key rescales them to exactly 0.
        init_max_BHT = jnp.full(block_query_BHTK.shape[:3], MASK_VALUE)
        zeros_BHTK = jnp.zeros(block_query_BHTK.shape, jnp.float32)
        init = init_max_BHT, jnp.zeros_like(init_max_BHT), zeros_BHTK
        end = i + 1 if layout.skips_masked else key_BHSK.shape[2] // layout.key_block_size
        max_BHT, sum_BHT, out_BHTK = lax.fori_loop(0, end, attend_key_block, init)
        out_BHTK = (out_BHTK / sum_BHT[..., None]).astype(query_BHTK.dtype)
        return out_BHTK, max_BHT + jnp.log(sum_BHT)

    blocks = jnp.arange(query_BHTK.shape[2] // layout.query_block_size)
    out_BHTK, lse_BHT = (
        checkpoint_name(merge_blocks(x), ATTN_OUT) for x in lax.map(attend_query_block, blocks)
    )
    return out_BHTK, (query_BHTK, key_BHSK, value_BHSK, query_info, out_BHTK, lse_BHT)


def _bwd(layout: BlockLayout, residuals: Any, grad_BHTK: QueriesHeadsFirst) -> tuple[Any, ...]:
    """Returns the gradients of queries, keys and values.

    With weights P, output O and dO its gradient (Dao 2023, algorithm 2): dV = P^T dO,
    dP = dO V^T, dS = P * (dP - delta) with delta = rowsum(dO * O), dQ = dS K, and
    dK = dS^T Q.
    """
    query_BHTK, key_BHSK, value_BHSK, query_info, out_BHTK, lse_BHT = residuals
    query_size, key_size = layout.query_block_size, layout.key_block_size
    scale = query_BHTK.shape[-1] ** -0.5
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # The softmax gradient subtracts rowsum(P * dP), which equals rowsum(dO * O).
    delta_BHT = einsum("BHTK,BHTK->BHT", grad_BHTK, out_BHTK)

    def grad_key_block(grad_query_BHTK: Array, j: Array) -> tuple[Array, Any]:
        block_key_BHSK = slice_block(key_BHSK, 2, j, key_size)
        block_value_BHSK = slice_block(value_BHSK, 2, j, key_size)

        def add_query_block(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            grad_query_BHTK, grad_key_BHSK, grad_value_BHSK = carry
            block_query_BHTK, block_grad_BHTK, block_lse_BHT, block_delta_BHT = (
                slice_block(x, 2, i, query_size)
                for x in (query_BHTK, grad_BHTK, lse_BHT, delta_BHT)
            )
            score_BHTS = block_scores(layout, block_query_BHTK, block_key_BHSK, query_info, i, j)
            weight_BHTS = jnp.exp(score_BHTS - block_lse_BHT[..., None])
            grad_value_BHSK += einsum(
                "BHTS,BHTK->BHSK", weight_BHTS.astype(grad_BHTK.dtype), block_grad_BHTK
            )
            grad_BHTS = einsum("BHTK,BHSK->BHTS", block_grad_BHTK, block_value_BHSK)
            grad_BHTS = weight_BHTS * (grad_BHTS - block_delta_BHT[..., None])
            grad_BHTS = (grad_BHTS * scale).astype(query_BHTK.dtype)
            grad_key_BHSK += einsum("BHTS,BHTK->BHSK", grad_BHTS, block_query_BHTK)
            block_BHTK = einsum("BHTS,BHSK->BHTK", grad_BHTS, block_key_BHSK)
            block_BHTK += slice_block(grad_query_BHTK, 2, i, query_size)
            grad_query_BHTK = lax.dynamic_update_slice_in_dim(
                grad_query_BHTK, block_BHTK, i * query_size, 2
            )
            return grad_query_BHTK, grad_key_BHSK, grad_value_BHSK

        zeros_BHSK = jnp.zeros(block_key_BHSK.shape, jnp.float32)
        start, end = j if layout.skips_masked else 0, query_BHTK.shape[2] // query_size
        grad_query_BHTK, *grads = lax.fori_loop(
            start, end, add_query_block, (grad_query_BHTK, zeros_BHSK, zeros_BHSK)
        )
        return grad_query_BHTK, tuple(x.astype(key_BHSK.dtype) for x in grads)

    zeros_BHTK = jnp.zeros(query_BHTK.shape, jnp.float32)
    blocks = jnp.arange(key_BHSK.shape[2] // key_size)
    grad_query_BHTK, grads = lax.scan(grad_key_block, zeros_BHTK, blocks)
    return grad_query_BHTK.astype(query_BHTK.dtype), *map(merge_blocks, grads), None


_flash_attention.defvjp(_fwd, _bwd)


def block_scores(
    layout: BlockLayout,
    query_BHTK: QueriesHeadsFirst,
    key_BHSK: KeysHeadsFirst,
    query_info: QueryInfo,
    i: Int[Array, ""],
    j: Int[Array, ""],
) -> Float[Array, "B H T S"]:
    """Computes scores of query block i and key block j; MASK_VALUE where masked."""
    score_BHTS = jnp.einsum(
        "BHTK,BHSK->BHTS", query_BHTK, key_BHSK, preferred_element_type=jnp.float32
    )
    key_position_S = j * layout.key_block_size + jnp.arange(layout.key_block_size)
    query_position_BT, segment_id_BT = jax.tree.map(
        lambda x_BT: slice_block(x_BT, 1, i, layout.query_block_size), query_info
    )
    segment_id_BS = None
    if query_info.segment_id_BT is not None:
        segment_id_BS = slice_block(query_info.segment_id_BT, 1, j, layout.key_block_size)
    mask_BTS = make_attention_mask(
        layout.causal, query_position_BT, key_position_S, segment_id_BT, segment_id_BS
    )
    mask_BTS &= (key_position_S < layout.num_keys)[None, None]
    return jnp.where(mask_BTS[:, None], score_BHTS * query_BHTK.shape[-1] ** -0.5, MASK_VALUE)


def slice_block(x: Array, axis: int, n: Array, size: int) -> Array:
    """Returns block n of an axis, of the given block size."""
    return lax.dynamic_slice_in_dim(x, n * size, size, axis)


def pad_to_multiple(x: Array, axis: int, size: int) -> Array:
    """Pads an axis with zeros at its end to a multiple of `size`."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, width)


def merge_blocks(x: Float[Array, "n B H T *K"]) -> Float[Array, "B H nT *K"]:
    """Merges n blocks, stacked along the first axis, into one axis of positions."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
