"""`jax.nn.dot_product_attention` compiled by XLA; O(T·S) memory."""

import jax

from gptjax.attention.call import AttentionSpec, dropout_unsupported
from gptjax.attention.sight import (
    QueryHeads,
    KeyValueHeads,
    AttentionMask,
    materialize_mask,
)


def xla_attention(
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
) -> QueryHeads:
    """Computes attention with JAX's own implementation."""
    mask_BTS = materialize_mask(mask, query_BTHK, key_BSHK)
    return jax.nn.dot_product_attention(
        query_BTHK,
        key_BSHK,
        value_BSHK,
        mask=mask_BTS[:, None],
        implementation="xla",
    )


def xla_unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the XLA backend does not support a call, or ""."""
    return dropout_unsupported("xla") if spec.dropout else ""
