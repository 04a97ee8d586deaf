"""Attention by one function, whichever backend computes it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from gptjax.attention import blockwise, cudnn, plain, prefix, splash, xla
from gptjax.attention import call as asked
from gptjax.attention.sight import Heads, KeyHeads, Sight
from gptjax.errors import ConfigError


class Backend(NamedTuple):
    """A way to compute attention, and what it says to a call that it cannot answer."""

    run: Callable[..., Heads]
    obstacle: Callable[[asked.Call], str]


BACKENDS: Mapping[str, Backend] = {
    "plain": Backend(plain.plain, lambda call: ""),
    "prefix": Backend(prefix.prefix, lambda call: ""),
    "xla": Backend(xla.xla, xla.obstacle),
    "blockwise": Backend(blockwise.blockwise, blockwise.obstacle),
    "cudnn": Backend(cudnn.cudnn, cudnn.obstacle),
    "splash": Backend(splash.splash, splash.obstacle),
}
AUTO = {  # platform: the first that can answer; caches go to "plain"
    "cpu": ("prefix",),
    "tpu": ("splash", "xla"),
    "gpu": ("cudnn", "xla"),
    asked.OLDER_GPU: ("xla",),
}


def attend(
    query_BTHK: Heads,
    key_BSHK: KeyHeads,
    value_BSHK: KeyHeads,
    sight: Sight,
    *,
    backend: str = "auto",
    dropout: Callable[[Array], Array] | None = None,
) -> Heads:
    """Each query's mean of the values, weighted by how well their keys fit it.

    Softmax statistics are float32 in every backend.

    Args:
        query_BTHK: [B, T, H, K].
        key_BSHK: [B, S, H, K], S = T unless queries have slots.
        value_BSHK: [B, S, H, K].
        sight: what each query may see.
        backend: a name of `BACKENDS`, or "auto".
        dropout: what the weights go through before they are used.

    Raises:
        ConfigError: the backend cannot do what is asked; nothing is left out silently.
    """
    _, queries, _, head_width = query_BTHK.shape
    keys = key_BSHK.shape[1]
    if sight.window is not None and sight.window < 1:
        raise ConfigError(
            f"a window of {sight.window} keys hides a query from itself. Use 1 or more."
        )
    if sight.slot_BT is not None and sight.segment_BT is not None:
        raise ConfigError(
            "slots say nothing about whose the keys are, so that segments of the "
            "queries cannot be compared. Leave Sight.slot_BT or Sight.segment_BT."
        )
    if sight.slot_BT is None and queries != keys:
        raise ConfigError(
            f"{queries} queries have {keys} keys, but no slots that say where among "
            "these they stand. Give Sight.slot_BT."
        )
    call = asked.Call(
        queries,
        keys,
        head_width,
        str(query_BTHK.dtype),
        asked.platform(),
        dropout is not None,
        sight.slot_BT is not None,
    )
    name = best(call) if backend == "auto" else able(backend, call)
    options: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    return BACKENDS[name].run(query_BTHK, key_BSHK, value_BSHK, sight, **options)


def best(call: asked.Call) -> str:
    """What "auto" stands for."""
    if call.slots:
        return "plain"
    names = *AUTO.get(call.platform, ("xla",)), "plain"
    return next(name for name in names if not BACKENDS[name].obstacle(call))


def able(name: str, call: asked.Call) -> str:
    """The name, of a backend that can answer."""
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no attention backend {name!r}. Choose auto or one of "
            f"{', '.join(BACKENDS)}."
        )
    if problem := BACKENDS[name].obstacle(call):
        raise ConfigError(problem)
    return name


def chosen_backend(
    name: str,
    *,
    length: int,
    head_width: int,
    dtype: Any,
    dropout: float = 0.0,
    decoding: bool = False,
    platform: str = "",
) -> str:
    """The backend that a model's `attention` stands for.

    Args:
        name: model.attention.
        length: [T] of a row.
        head_width: [K].
        dtype: of activations.
        dropout: model.dropout, where it is in use.
        decoding: whether queries read a cache.
        platform: "cpu", "gpu" or "tpu"; "" = this one.

    Raises:
        ConfigError: a backend was named that cannot do it.
    """
    call = asked.Call(
        length,
        length,
        head_width,
        str(jnp.dtype(dtype)),
        platform or asked.platform(),
        dropout > 0,
        decoding,
    )
    return best(call) if name == "auto" else able(name, call)
