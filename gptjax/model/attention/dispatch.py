"""Attention dispatch: one function, several backends, selected by support."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptjax.errors import ConfigError
from gptjax.model.attention import cudnn, flash, reference, splash
from gptjax.model.attention.mask import (
    AttentionMask,
    AttentionSpec,
    GroupedHeads,
    KeyValueHeads,
    QueryHeads,
    query_positions,
)
from gptjax.parallel.sharding import current_mesh_shape, divisible_spec
from gptjax.runtime import device
from gptjax.runtime.device import GPU_PRE_AMPERE


class Backend(NamedTuple):
    """Attention implementation, and a check of the calls it supports."""

    run: Callable[..., QueryHeads]
    forms_weights: bool = False  # takes `edit_weights`, e.g. dropout
    is_local: bool = False  # needs `shard_map`: the compiler cannot partition it
    unsupported_reason: Callable[[AttentionSpec], str] = lambda spec: ""


BACKENDS: Mapping[str, Backend] = {
    "reference": Backend(reference.reference_attention, forms_weights=True),
    "chunked": Backend(reference.chunked_causal_attention, forms_weights=True),
    "xla": Backend(reference.xla_attention),
    "flash": Backend(flash.flash_attention, is_local=True),
    "cudnn": Backend(cudnn.cudnn_attention, False, True, cudnn.cudnn_unsupported_reason),
    "splash": Backend(splash.splash_attention, False, True, splash.splash_unsupported_reason),
}
DEFAULT_ORDER = {  # by platform: the first supported one; KV caches use "reference"
    "cpu": ("chunked",),
    "tpu": ("splash", "xla"),
    "gpu": ("cudnn", "xla"),
    GPU_PRE_AMPERE: ("xla",),
}


def compute_attention(
    query_BTHK: QueryHeads,
    key_BSGK: GroupedHeads,
    value_BSGK: GroupedHeads,
    mask: AttentionMask,
    *,
    backend: str = "auto",
    edit_weights: Callable[[Array], Array] | None = None,
) -> QueryHeads:
    """Computes multi-head scaled dot-product attention [B, T, H, K].

    Softmax statistics are float32 in every backend. A backend that does not support an
    argument raises instead of ignoring it. `backend` is a key of `BACKENDS`, or "auto".
    S = T unless `mask` has query positions. `edit_weights` is a function of the
    attention weights [B, H, T, S], such as dropout. Each head of keys and values is for
    H / G consecutive heads of queries (Ainslie et al. 2023).
    """
    _, queries, heads, head_dim = query_BTHK.shape
    keys, kv_heads = key_BSGK.shape[1:3]
    if heads != kv_heads and mask.query_position_BT is not None and edit_weights is None:
        return attend_grouped(query_BTHK, key_BSGK, value_BSGK, mask, backend)
    key_BSHK, value_BSHK = (
        x if heads == kv_heads else jnp.repeat(x, heads // kv_heads, axis=2)
        for x in (key_BSGK, value_BSGK)
    )
    if mask.query_position_BT is not None and mask.segment_id_BT is not None:
        raise ConfigError(
            "AttentionMask.query_position_BT and segment_id_BT cannot be combined: the "
            "segment ids of cached keys are unknown. Give only one of them."
        )
    if mask.query_position_BT is None and queries != keys:
        raise ConfigError(
            f"{queries} queries have {keys} keys, so their positions among the keys "
            "are ambiguous. Give AttentionMask.query_position_BT."
        )
    spec = AttentionSpec(
        num_queries=queries,
        num_keys=keys,
        head_dim=head_dim,
        dtype=str(query_BTHK.dtype),
        platform=device.target_platform(),
        edits_weights=edit_weights is not None,
        has_query_positions=mask.query_position_BT is not None,
    )
    options = {} if edit_weights is None else {"edit_weights": edit_weights}
    run, _, is_local, _ = BACKENDS[select_backend(backend, spec)]
    if is_local:
        return shard_map_attention(run, query_BTHK, key_BSHK, value_BSHK, mask)
    return run(query_BTHK, key_BSHK, value_BSHK, mask, **options)


def attend_grouped(
    query_BTHK: QueryHeads,
    key_BSGK: GroupedHeads,
    value_BSGK: GroupedHeads,
    mask: AttentionMask,
    backend: str,
) -> QueryHeads:
    """Computes grouped-query attention without repeating the keys of a KV cache.

    The queries of a group become queries of one head at the same position.
    """
    rows, queries, heads, head_dim = query_BTHK.shape
    kv_heads = key_BSGK.shape[2]
    group_size = heads // kv_heads
    shape = rows, queries, kv_heads, group_size, head_dim
    query_BTGK = jnp.swapaxes(query_BTHK.reshape(shape), 2, 3)
    query_BTGK = query_BTGK.reshape(rows, queries * group_size, kv_heads, head_dim)
    position_BT = jnp.repeat(query_positions(mask, query_BTHK), group_size, axis=1)
    mask = mask._replace(query_position_BT=position_BT)
    out = compute_attention(query_BTGK, key_BSGK, value_BSGK, mask, backend=backend)
    out = jnp.swapaxes(out.reshape(rows, queries, group_size, kv_heads, head_dim), 2, 3)
    return out.reshape(query_BTHK.shape)


def shard_map_attention(
    attention: Callable[..., QueryHeads],
    query_BTHK: QueryHeads,
    key_BSHK: KeyValueHeads,
    value_BSHK: KeyValueHeads,
    mask: AttentionMask,
) -> QueryHeads:
    """Calls `attention`; on a mesh, on each device with its shard of rows and heads."""
    if not current_mesh_shape():
        return attention(query_BTHK, key_BSHK, value_BSHK, mask)
    names = [n for n in ("query_position_BT", "segment_id_BT") if getattr(mask, n) is not None]

    def attend_shard(query: Array, key: Array, value: Array, *arrays: Array) -> QueryHeads:
        mask_arrays: Any = dict(zip(names, arrays, strict=True))
        return attention(query, key, value, mask._replace(**mask_arrays))

    arrays = query_BTHK, key_BSHK, value_BSHK, *(getattr(mask, name) for name in names)
    specs = tuple(map(divisible_spec, arrays, ("BTHK", "BSHK", "BSHK", *("BT" for _ in names))))
    mapped = jax.shard_map(attend_shard, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*arrays)


def select_backend(name: str, spec: AttentionSpec) -> str:
    """Returns the backend of that name if it supports the call; "auto": the fastest."""
    if name == "auto":
        if spec.has_query_positions:
            return "reference"
        names = *DEFAULT_ORDER.get(spec.platform, ("xla",)), "reference"
        return next(name for name in names if not unsupported_reason(name, spec))
    if name not in BACKENDS:
        raise ConfigError(
            f"model.attention={name!r} is unknown. Choose auto or one of {', '.join(BACKENDS)}."
        )
    if problem := unsupported_reason(name, spec):
        raise ConfigError(problem)
    return name


def unsupported_reason(name: str, spec: AttentionSpec) -> str:
    """Returns why a backend does not support a call, or ""."""
    if spec.edits_weights and not BACKENDS[name].forms_weights:
        return (
            f"model.attention={name!r} does not support dropout. Use "
            "model.attention='reference' or model.dropout=0."
        )
    return BACKENDS[name].unsupported_reason(spec)
