"""What attention has computed and writing reads again; letters as in `gptjax.model`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.sharding import lay


class LayerCache(NamedTuple):
    """Keys and values that one layer has computed; slot s holds position s.

    Heads come before slots, as the products want it: a cache laid out otherwise is
    copied for every token.
    """

    key_BHSK: Float[Array, "B H S K"]
    value_BHSK: Float[Array, "B H S K"]


def extend(
    cache: LayerCache,
    key_BTHK: Float[Array, "B T H K"],
    value_BTHK: Float[Array, "B T H K"],
    slot_BT: Int[Array, "B T"],
) -> LayerCache:
    """The cache with the keys and values of T new positions, each row at its own."""

    def put(old_BHSK: Array, new_BTHK: Array) -> Array:
        new_BHTK = jnp.swapaxes(new_BTHK, 1, 2).astype(old_BHSK.dtype)
        if len(old_BHSK) == 1 and new_BHTK.shape[2] == 1:
            # A scatter is in place; XLA makes another update twice, and copies for it.
            place = 0, jnp.arange(old_BHSK.shape[1]), slot_BT[0, 0]
            return lay(old_BHSK.at[place].set(new_BHTK[0, :, 0]), "BHSK")
        write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
        return lay(write(old_BHSK, new_BHTK, slot_BT[:, 0], 1), "BHSK")

    return LayerCache(put(cache.key_BHSK, key_BTHK), put(cache.value_BHSK, value_BTHK))
