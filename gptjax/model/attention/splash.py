"""Splash attention, JAX's Pallas kernel for TPU; O(T) memory.

The kernel skips blocks that are masked by causality or a sliding window. On other
platforms it runs in interpret mode: slow, for tests only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptjax.model.attention.mask import ATTN_OUT, AttentionMask, KeyValueHeads, QueryHeads
from gptjax.model.attention.spec import AttentionSpec, shard_map_attention
from gptjax.runtime import device

TPU_LANES = 128  # of a TPU vector register; block sizes are multiples of it
# Fastest first; the first that divides the row length is used.
SPLASH_BLOCK_SIZES = (512, 384, 256, TPU_LANES)


def splash_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention with the splash kernel, on each device's rows and heads."""
    interpret = device.target_platform() != "tpu"

    def attend_shard(
        query_BTHK: QueryHeads,
        key_BSHK: KeyValueHeads,
        value_BSHK: KeyValueHeads,
        mask: AttentionMask,
    ) -> QueryHeads:
        _, length, heads, head_dim = query_BTHK.shape
        kernel = make_splash_kernel(length, heads, mask.causal, mask.sliding_window, interpret)
        query_BTHK = (query_BTHK * head_dim**-0.5).astype(query_BTHK.dtype)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (query_BTHK, key_BSHK, value_BSHK))
        segments = () if mask.segment_id_BT is None else (mask.segment_id_BT,)
        return jnp.swapaxes(kernel(*heads_first, *segments), 1, 2)

    return shard_map_attention(attend_shard, query_BTHK, key_BSHK, value_BSHK, mask)


def make_splash_kernel(
    length: int, heads: int, causal: bool, sliding_window: int | None, interpret: bool
) -> Any:
    """Returns the kernel as a function of B rows: (query, key, value, *segment ids)."""
    # Imported lazily: Pallas takes 0.1 s.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape = (length, length)
    mask: Any = library.FullMask(shape)
    if sliding_window is not None:
        mask = library.LocalMask(shape, (sliding_window - 1, 0 if causal else None), 0)
    elif causal:
        mask = library.CausalMask(shape)
    block_size = next(block for block in SPLASH_BLOCK_SIZES if length % block == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    sizes: Any = {f"block_{name}": block_size for name in names.split()}
    row_kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTN_OUT,
        interpret=interpret,
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
