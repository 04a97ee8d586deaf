"""A number for each array that is the same on every mesh.

Element i counts with its bits times an odd number that follows from i, modulo 2**32.
Integers add up to the same in any order, so devices and processes may each sum what
they hold; one bit that flips, or two elements that change places, show.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from gptjax.tree import named_leaves

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # of a number of bytes


class Checked(NamedTuple):
    """What is known of each array by its name."""

    sums: dict[str, int]  # the checksum, below 2**32
    endless: list[str]  # names of those with a value that is not finite


def checked(tree: Any) -> Checked:
    """The checksums of a tree of arrays, wherever they lie.

    Of many processes all have to ask, and all get the same.
    """
    leaves = named_leaves(tree)
    sums, finite = (np.asarray(x) for x in program(tree)([*leaves.values()]))
    return Checked(
        dict(zip(leaves, sums.tolist(), strict=True)),
        [name for name, good in zip(leaves, finite.tolist(), strict=True) if not good],
    )


def program(tree: Any) -> Any:
    """The compiled work; on a mesh, each process gets all of its result."""
    first = jax.tree.leaves(tree)[0]
    where = getattr(first, "sharding", None)
    if isinstance(where, NamedSharding):
        return compiled(NamedSharding(where.mesh, PartitionSpec()))
    return compiled(None)


@functools.cache
def compiled(result: NamedSharding | None) -> Any:
    """One function for each place of the result, so that JAX knows it again."""
    return jax.jit(work, out_shardings=result)


def work(leaves: list[Any]) -> tuple[Array, Array]:
    """Of each leaf its checksum, and whether all its values are finite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.stack([checksum(x) for x in leaves]), jnp.stack(finite)


def checksum(x: Any) -> UInt32[Array, ""]:
    """The sum over the bits of all elements, each times its own odd number."""
    bits = words(x)
    return jnp.sum(bits * odd_numbers(bits.shape), dtype=jnp.uint32)


def words(x: Any) -> UInt32[Array, "..."]:
    """The bits of each element; 8 bytes are two words on one more axis."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = WORDS.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def odd_numbers(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """One for each place in row-major order: its index, well mixed, last bit set.

    Shifts and products as in the finaliser of MurmurHash3 (Appleby, public domain).
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (index ^ (index >> jnp.uint32(16))) | jnp.uint32(1)
