"""Checksums of arrays: equal on any mesh, different for any other value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import checksum, checksum_tree
from tests.chaos.resharded import checksum_with_numpy


def checksums(*arrays):
    tree = {f"{n:03}": array for n, array in enumerate(arrays)}
    return list(checksum_tree(tree)[0].values())


@pytest.mark.fast
def test_checksums_agree_with_numpy_on_any_mesh():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    for axes in (("a", None), (None, "b"), ("b", "a")):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
        assert checksums(sharded) == [checksum_with_numpy(x)]
    assert checksums(x) == [checksum_with_numpy(x)]


@pytest.mark.parametrize("dtype", ["int8", "bool", "bfloat16", "float32"])
def test_any_flipped_bit_changes_the_checksum(dtype):
    data = np.asarray(jnp.ones((4, 5), dtype)).tobytes()
    flipped = []
    for bit in range(0, 8 * len(data), 8 if dtype == "bool" else 1):
        other = bytearray(data)
        other[bit // 8] ^= 1 << bit % 8
        flipped.append(np.frombuffer(bytes(other), jnp.dtype(dtype)).reshape(4, 5))

    sums = jax.jit(jax.vmap(checksum))(np.stack(flipped))

    assert checksums(np.ones((4, 5), dtype))[0] not in np.asarray(sums)


def test_moved_elements_and_negative_zeros_change_the_checksum():
    x = jnp.arange(64.0).reshape(8, 8)

    found = checksums(x, x.T, x[::-1], jnp.roll(x, 1), x.at[0].set(x[1]))

    assert len(set(found)) == 5
    assert len(set(checksums(jnp.zeros(3), -jnp.zeros(3)))) == 2


def test_arrays_with_non_finite_values_are_named():
    tree = {"a": jnp.ones(3), "infinite": jnp.array([1.0, jnp.inf]), "nan": jnp.float32(jnp.nan)}
    tree |= {"integers": jnp.arange(3), "empty": jnp.zeros((0, 3))}

    assert checksum_tree(tree)[1] == ["infinite", "nan"]
