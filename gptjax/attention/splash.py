"""Splash attention, the TPU kernel that JAX ships; O(T) memory.

It visits no block of keys that causality or a window hides. Elsewhere than on a TPU
it is interpreted, slowly, for tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptjax.attention import call as asked
from gptjax.attention.parts import by_parts
from gptjax.attention.sight import MIXED, Heads, KeyHeads, Sight

LANES = 128  # of a TPU's vector unit: blocks are multiples of it
BLOCKS = (512, 384, 256, LANES)  # the largest that divides a row is the fastest


def splash(
    query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
) -> Heads:
    """The same sum, by Google's kernel."""
    interpret = asked.platform() != "tpu"

    def part(
        query_BTHK: Heads, key_BSHK: KeyHeads, value_BSHK: KeyHeads, sight: Sight
    ) -> Heads:
        _, length, heads, width = query_BTHK.shape
        run = kernel(length, heads, sight.causal, sight.window, interpret)
        query_BTHK = (query_BTHK * width**-0.5).astype(query_BTHK.dtype)
        heads_first = (
            jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK)
        )
        segments = () if sight.segment_BT is None else (sight.segment_BT,)
        return jnp.swapaxes(run(*heads_first, *segments), 1, 2)

    return by_parts(part, query_BTHK, key_BSHK, value_BSHK, sight)


def kernel(
    length: int, heads: int, causal: bool, window: int | None, interpret: bool
) -> Any:
    """The kernel for rows of that length, as a function of B rows [H, T, K]."""
    # Pallas takes 0.1 s to import: only where it is used.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape = (length, length)
    mask: Any = library.FullMask(shape)
    if window is not None:
        mask = library.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    elif causal:
        mask = library.CausalMask(shape)
    block = next(block for block in BLOCKS if length % block == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    sizes: Any = {f"block_{name}": block for name in names.split()}
    one = library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=MIXED,
        interpret=interpret,
    )

    def each(query: Array, key: Array, value: Array, *segments: Array) -> Any:
        ids = [library.SegmentIds(segment, segment) for segment in segments]
        return one(query, key, value, *ids)

    return jax.vmap(each)


def obstacle(call: asked.Call) -> str:
    """Why this backend cannot answer, or nothing."""
    name = "model.attention='splash'"
    if call.dropout:
        return asked.cannot_drop("splash")
    if call.slots:
        return (
            f"{name} knows no slots (Sight.slot_BT), so that it cannot read a cache. "
            "Use model.attention='plain'."
        )
    if call.platform not in ("tpu", "cpu"):
        return f"{name} needs a TPU, not a {call.platform}. Use model.attention='auto'."
    if call.queries % LANES or call.keys != call.queries:
        return (
            f"{name} takes rows of a multiple of {LANES} tokens, not {call.queries}. "
            "Use model.attention='xla' or such a length."
        )
    return ""
