"""KV cache: keys and values of earlier positions, for decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.parallel.sharding import constrain


class KVCache(NamedTuple):
    """KV cache of one layer; index s on axis S holds position s.

    Heads come before positions, the layout that the attention matmuls need: with any
    other, XLA transposes the cache for every token.
    """

    key_BHSK: Float[Array, "B H S K"]
    value_BHSK: Float[Array, "B H S K"]


def update_cache(
    cache: KVCache,
    key_BTHK: Float[Array, "B T H K"],
    value_BTHK: Float[Array, "B T H K"],
    position_BT: Int[Array, "B T"],
) -> KVCache:
    """Writes the keys and values of T new positions into the cache.

    Positions are consecutive in a row; rows may start at different ones.
    """

    def update(cached_BHSK: Array, new_BTHK: Array) -> Array:
        new_BHTK = jnp.swapaxes(new_BTHK, 1, 2).astype(cached_BHSK.dtype)
        if len(cached_BHSK) == 1 and new_BHTK.shape[2] == 1:
            # XLA runs a scatter in place, but duplicates a dynamic update and copies.
            index = 0, jnp.arange(cached_BHSK.shape[1]), position_BT[0, 0]
            return constrain(cached_BHSK.at[index].set(new_BHTK[0, :, 0]), "BHSK")
        write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
        return constrain(write(cached_BHSK, new_BHTK, position_BT[:, 0], 1), "BHSK")

    return KVCache(update(cache.key_BHSK, key_BTHK), update(cache.value_BHSK, value_BTHK))
