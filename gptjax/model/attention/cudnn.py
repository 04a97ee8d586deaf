"""cuDNN's flash attention, for NVIDIA GPUs from Ampere on.

It does not support segment ids: packed rows are masked by an array [B, 1, T, S], which
costs memory but is exact.
"""

from typing import Any

import jax

from gptjax.errors import ConfigError
from gptjax.model.attention.mask import AttentionMask, KeyValueHeads, QueryHeads, materialize_mask
from gptjax.model.attention.spec import AttentionSpec, dropout_unsupported, shard_map_attention

MAX_HEAD_DIM = 128  # supported by cuDNN on every GPU from Ampere on
_OPTION = "model.attention='cudnn'"


def cudnn_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention with NVIDIA's kernel.

    Raises:
        ConfigError: cuDNN is missing, or rejects these shapes.
    """
    try:
        return shard_map_attention(_attend_shard, query_BTHK, key_BSHK, value_BSHK, mask)
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # an error of the device, such as out of memory
        raise ConfigError(f"{_OPTION} failed: {error} Use model.attention='xla'.") from error


def _attend_shard(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention for the rows and heads of one device.

    Causality and sliding windows are options of the kernel; everything else, including
    a window that is not causal, needs a mask array.
    """
    has_arrays = mask.query_position_BT is not None or mask.segment_id_BT is not None
    options: dict[str, Any] = {}
    if has_arrays or (mask.sliding_window is not None and not mask.causal):
        mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
        options["mask"] = mask_BTS[:, None]
    else:
        options["is_causal"] = mask.causal
        if mask.sliding_window is not None:
            options["local_window_size"] = (mask.sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        query_BTHK, key_BSHK, value_BSHK, implementation="cudnn", **options
    )


def cudnn_unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the cuDNN backend does not support a call, or ""."""
    alternative = "Use model.attention='xla'"
    if spec.dropout:
        return dropout_unsupported("cudnn")
    if spec.platform != "gpu":
        return f"{_OPTION} needs an NVIDIA GPU from Ampere on, not {spec.platform}. {alternative}."
    if spec.dtype not in ("bfloat16", "float16"):
        return (
            f"{_OPTION} needs a 16-bit dtype, not {spec.dtype}. {alternative} or "
            "model.dtype='bfloat16'."
        )
    if spec.head_dim % 8 or spec.head_dim > MAX_HEAD_DIM:
        return (
            f"{_OPTION} needs a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, "
            f"not {spec.head_dim}. {alternative} or change model.n_heads."
        )
    if spec.num_keys % 2 or (spec.num_queries % 2 and not spec.has_query_positions):
        return (
            f"{_OPTION} needs rows of even length, not {spec.num_queries} queries and "
            f"{spec.num_keys} keys. {alternative} or an even context length."
        )
    return ""
