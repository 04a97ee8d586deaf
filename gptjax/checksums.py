"""Array checksums that do not depend on the sharding.

Each element contributes its bits times an odd weight derived from its index, modulo
2**32. Integer addition is associative, so devices and processes can sum their shards
separately. A flipped bit or two swapped elements change the sum.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from gptjax.tree import flatten_with_names

UINT_DTYPES = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by item size in bytes


class ArrayChecksums(NamedTuple):
    """Checksums of the arrays of a tree."""

    sums: dict[str, int]  # by name, below 2**32
    nonfinite: list[str]  # names of arrays with a non-finite value


def checksum_tree(tree: Any) -> ArrayChecksums:
    """Computes the checksums of a tree of arrays on any devices.

    A collective operation: all processes must call it, and get the same result.
    """
    leaves = flatten_with_names(tree)
    sums, is_finite = (
        np.asarray(x) for x in _make_checksum_fn(tree)([*leaves.values()])
    )
    return ArrayChecksums(
        dict(zip(leaves, sums.tolist(), strict=True)),
        [name for name, ok in zip(leaves, is_finite.tolist(), strict=True) if not ok],
    )


def _make_checksum_fn(tree: Any) -> Any:
    """Returns the jitted checksum function; on a mesh its result is replicated."""
    first = jax.tree.leaves(tree)[0]
    sharding = getattr(first, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return _jit_checksum_fn(NamedSharding(sharding.mesh, PartitionSpec()))
    return _jit_checksum_fn(None)


@functools.cache
def _jit_checksum_fn(out_sharding: NamedSharding | None) -> Any:
    """Returns one jitted function per output sharding, so that JAX caches it."""
    return jax.jit(_checksum_leaves, out_shardings=out_sharding)


def _checksum_leaves(leaves: list[Any]) -> tuple[Array, Array]:
    """Returns the checksum of each leaf, and True if all its values are finite."""
    is_finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.stack([checksum(x) for x in leaves]), jnp.stack(is_finite)


def checksum(x: Any) -> UInt32[Array, ""]:
    """Returns the sum of the bits of all elements, times their index weights."""
    bits = as_uint32(x)
    return jnp.sum(bits * index_weights(bits.shape), dtype=jnp.uint32)


def as_uint32(x: Any) -> UInt32[Array, "..."]:
    """Returns the bits as uint32; 8-byte elements become two on a new last axis."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    uint_dtype = UINT_DTYPES.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, uint_dtype).astype(jnp.uint32)


def index_weights(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns an odd pseudorandom weight for each row-major index.

    The mixing steps are those of the MurmurHash3 finalizer (Appleby, public domain).
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (index ^ (index >> jnp.uint32(16))) | jnp.uint32(1)
