"""Checksums of arrays: the same wherever they lie, another for any other value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import checksum_tree
from tests.chaos.resharded import by_numpy

SIZES = {"int8": 1, "bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}


def sum_of(x):
    return checksum_tree({"x": x}).sums["x"]


@pytest.mark.fast
def test_it_is_the_sum_that_numpy_finds():
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)

    assert sum_of(jnp.asarray(x)) == by_numpy(x)


@pytest.mark.parametrize("axes", [(None, None), ("a", None), (None, "b"), ("b", "a")])
def test_it_is_the_same_on_any_mesh(axes):
    x = jax.random.normal(jax.random.key(0), (8, 16))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    found = sum_of(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes))))

    assert found == sum_of(x)


@pytest.mark.parametrize("dtype", SIZES)
def test_any_flipped_bit_shows(dtype):
    x = np.ones((4, 5), dtype)

    @given(st.integers(0, x.nbytes - 1), st.integers(0, 7))
    def flipped(byte, bit):
        data = bytearray(x.tobytes())
        data[byte] ^= 1 << (bit if dtype != "bool" else 0)
        other = np.frombuffer(bytes(data), x.dtype).reshape(x.shape)
        assert sum_of(jnp.asarray(other)) != sum_of(jnp.asarray(x))

    x = np.asarray(jnp.ones((4, 5), dtype))
    flipped()


def test_elements_that_change_places_show():
    x = jnp.arange(64.0).reshape(8, 8)

    sums = {sum_of(y) for y in (x, x.T, x[::-1], jnp.roll(x, 1), x.at[0].set(x[1]))}

    assert len(sums) == 5


def test_minus_zero_is_not_zero():
    assert sum_of(jnp.zeros(3)) != sum_of(-jnp.zeros(3))


def test_the_arrays_with_values_that_are_not_finite_are_named():
    tree = {
        "good": jnp.ones(3),
        "large": jnp.array([1.0, jnp.inf]),
        "none": jnp.float32(jnp.nan),
        "whole": jnp.arange(3),
        "nothing": jnp.zeros((0, 3)),
    }

    assert checksum_tree(tree).nonfinite == ["large", "none"]
