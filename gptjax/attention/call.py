"""Attention call properties that determine backend support."""

from typing import NamedTuple


class AttentionSpec(NamedTuple):
    """Static properties of one attention call."""

    num_queries: int  # [T]
    num_keys: int  # [S]
    head_dim: int  # [K]
    dtype: str
    platform: str  # as returned by `target_platform`
    dropout: bool = False  # on attention weights
    has_query_positions: bool = False  # queries attend to a KV cache


def dropout_unsupported(name: str) -> str:
    """Returns the error message of a backend that does not support dropout."""
    return (
        f"model.attention={name!r} does not support dropout. Use "
        "model.attention='reference' or model.dropout=0."
    )
