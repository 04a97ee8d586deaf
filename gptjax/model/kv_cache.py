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

    key_BGSK: Float[Array, "B G S K"]
    value_BGSK: Float[Array, "B G S K"]


def update_cache(
    cache: KVCache,
    key_BTGK: Float[Array, "B T G K"],
    value_BTGK: Float[Array, "B T G K"],
    position_BT: Int[Array, "B T"],
) -> KVCache:
    """Writes the keys and values of T new positions into the cache.

    Positions are consecutive in a row; rows may start at different ones.
    """

    def update(cached_BGSK: Array, new_BTGK: Array) -> Array:
        new_BGTK = jnp.swapaxes(new_BTGK, 1, 2).astype(cached_BGSK.dtype)
        if len(cached_BGSK) == 1 and new_BGTK.shape[2] == 1:
            # XLA runs a scatter in place, but duplicates a dynamic update and copies.
            index = 0, jnp.arange(cached_BGSK.shape[1]), position_BT[0, 0]
            return constrain(cached_BGSK.at[index].set(new_BGTK[0, :, 0]), "BGSK")
        write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
        return constrain(write(cached_BGSK, new_BGTK, position_BT[:, 0], 1), "BGSK")

    return KVCache(update(cache.key_BGSK, key_BTGK), update(cache.value_BGSK, value_BTGK))
