"""Splash attention, JAX's Pallas kernel for TPU; O(T) memory.

The kernel skips blocks that are masked by causality. On other platforms it runs in
interpret mode: slow, for tests only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptjax.model.attention.mask import (
    ATTN_OUT,
    AttentionMask,
    AttentionSpec,
    KeyValueHeads,
    QueryHeads,
)
from gptjax.runtime import device

TPU_LANES = 128  # of a TPU vector register; block sizes are multiples of it
# Fastest first; the first that divides the row length is used.
SPLASH_BLOCK_SIZES = (512, 384, 256, TPU_LANES)


def splash_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention with the splash kernel."""
    _, length, heads, head_dim = query_BTHK.shape
    kernel = make_splash_kernel(length, heads, mask.causal)
    query_BTHK = (query_BTHK * head_dim**-0.5).astype(query_BTHK.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK))
    segments = () if mask.segment_id_BT is None else (mask.segment_id_BT,)
    return jnp.swapaxes(kernel(*heads_first, *segments), 1, 2)


def make_splash_kernel(length: int, heads: int, causal: bool) -> Any:
    """Returns the kernel as a function of B rows: (query, key, value, *segment ids)."""
    # Imported lazily: Pallas takes 0.1 s.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    mask = (library.CausalMask if causal else library.FullMask)((length, length))
    block_size = next(block for block in SPLASH_BLOCK_SIZES if length % block == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    sizes: Any = {f"block_{name}": block_size for name in names.split()}
    row_kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTN_OUT,
        interpret=device.target_platform() != "tpu",
    )

    def run_row(query: Array, key: Array, value: Array, *segments: Array) -> Any:
        ids = [library.SegmentIds(segment, segment) for segment in segments]
        return row_kernel(query, key, value, *ids)

    return jax.vmap(run_row)


def splash_unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the splash backend does not support a call, or ""."""
    name = "model.attention='splash'"
    if spec.has_query_positions:
        return (
            f"{name} does not support a KV cache (AttentionMask.query_position_BT). "
            "Use model.attention='reference'."
        )
    if spec.platform not in ("tpu", "cpu"):
        return f"{name} needs a TPU, not {spec.platform}. Use model.attention='auto'."
    if spec.num_queries % TPU_LANES or spec.num_keys != spec.num_queries:
        return (
            f"{name} needs rows whose length is a multiple of {TPU_LANES}, not "
            f"{spec.num_queries}. Use model.attention='xla' or change the context "
            "length."
        )
    return ""
