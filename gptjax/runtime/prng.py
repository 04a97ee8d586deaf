"""PRNG keys of seeds from 0 to 2**63 - 1, all distinct.

`jax.random.key` ignores the upper 32 bits of a seed unless 64-bit types are enabled.
"""

from typing import Any

import jax
from jaxtyping import Array, Key


def make_key(seed: int) -> Key[Array, ""]:
    """Returns the key of a seed; below 2**32, it equals `jax.random.key(seed)`."""
    high, low = divmod(seed, 2**32)
    return key_of_words(high, low) if high else jax.random.key(low)


def key_of_words(high: Any, low: Any) -> Key[Array, ""]:
    """Returns the key of the two 32-bit words of a seed."""
    data = jax.random.key_data(jax.random.key(low))
    return jax.random.wrap_key_data(data.at[::2].set(high))
