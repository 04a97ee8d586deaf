"""cuDNN's flash attention, for NVIDIA GPUs from Ampere on.

It does not support segment ids: packed rows are masked by an array [B, 1, T, S], which
costs memory but is exact.
"""

import jax

from gptjax.errors import ConfigError
from gptjax.model.attention.mask import (
    AttentionMask,
    AttentionSpec,
    KeyValueHeads,
    QueryHeads,
    materialize_mask,
)

MAX_HEAD_DIM = 128  # supported by cuDNN on every GPU from Ampere on
_OPTION = "model.attention='cudnn'"


def cudnn_attention(
    query_BTHK: QueryHeads, key_BSHK: KeyValueHeads, value_BSHK: KeyValueHeads, mask: AttentionMask
) -> QueryHeads:
    """Computes attention with NVIDIA's kernel."""
    has_arrays = mask.query_position_BT is not None or mask.segment_id_BT is not None
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK) if has_arrays else None
    try:
        return jax.nn.dot_product_attention(
            *(query_BTHK, key_BSHK, value_BSHK),
            mask=None if mask_BTS is None else mask_BTS[:, None],
            is_causal=mask.causal and not has_arrays,
            implementation="cudnn",
        )
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise  # an error of the device, such as out of memory
        raise ConfigError(f"{_OPTION} failed: {error} Use model.attention='xla'.") from error


def cudnn_unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the cuDNN backend does not support a call, or ""."""
    need = fix = ""
    if spec.platform != "gpu":
        need = f"an NVIDIA GPU from Ampere on, not {spec.platform}"
    elif spec.dtype not in ("bfloat16", "float16"):
        need, fix = f"a 16-bit dtype, not {spec.dtype}", " or model.dtype='bfloat16'"
    elif spec.head_dim % 8 or spec.head_dim > MAX_HEAD_DIM:
        need = f"a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, not {spec.head_dim}"
        fix = " or change model.n_heads"
    elif spec.num_keys % 2 or (spec.num_queries % 2 and not spec.has_query_positions):
        need = f"rows of even length, not {spec.num_queries} queries and {spec.num_keys} keys"
        fix = " or an even context length"
    return f"{_OPTION} needs {need}. Use model.attention='xla'{fix}." if need else ""
