"""What the compiler makes of each backend: memory, devices, the kernels of others."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gptjax.model.attention import flash, reference
from gptjax.model.attention.dispatch import compute_attention
from gptjax.model.attention.mask import AttentionMask
from gptjax.parallel import sharding
from gptjax.runtime import device

pytestmark = pytest.mark.mesh


def gradients(backend):
    """A jitted function of heads and segments: a loss and its gradients."""

    def loss(query_BTHK, key_BSHK, value_BSHK, segment_id_BT):
        mask = AttentionMask(None, segment_id_BT)
        out_BTHK = compute_attention(query_BTHK, key_BSHK, value_BSHK, mask, backend=backend)
        return jnp.sum(jnp.sin(out_BTHK.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def shapes(B, T, H, K, dtype="float32"):
    heads = [jax.ShapeDtypeStruct((B, T, H, K), dtype)] * 3
    return [*heads, jax.ShapeDtypeStruct((B, T), "int32")]


def test_memory_of_flash_attention_grows_in_proportion_to_the_row(monkeypatch):
    monkeypatch.setattr(flash, "FLASH_BLOCK_SIZE", 64)

    short, long = (
        gradients("flash").lower(*shapes(1, length, 1, 8)).compile().memory_analysis()
        for length in (512, 4096)
    )

    assert long.temp_size_in_bytes <= 8 * short.temp_size_in_bytes


@functools.cache
def expected_on_one_device(length):
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(4, length, 2, 8)), "float32") for _ in range(3)]
    segment_id_BT = jnp.asarray(np.sort(rng.integers(0, 3, (4, length))), "int32")
    return (*heads, segment_id_BT), gradients("reference")(*heads, segment_id_BT)


@pytest.mark.parametrize("backend", ["chunked", "xla", "splash", "flash"])
def test_eight_devices_compute_what_one_does_without_communication(backend, monkeypatch):
    monkeypatch.setattr(flash, "FLASH_BLOCK_SIZE", 16)
    monkeypatch.setattr(reference, "MAX_UNCHUNKED", 16)
    length = 128 if backend == "splash" else 40
    (*heads, segment_id_BT), expected = expected_on_one_device(length)
    kind = AxisType.Explicit if backend == "flash" else AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), sharding.MESH_AXES, axis_types=(kind,) * 3)

    with jax.set_mesh(mesh):
        rows = P(("data", "fsdp"))
        spread = [jax.device_put(x, P(*rows, None, "tensor")) for x in heads]
        args = (*spread, jax.device_put(segment_id_BT, rows))
        program = gradients(backend).lower(*args).compile()
        found = program(*args)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *(found, expected)
    )
    for grad in found[1]:
        assert grad.sharding.shard_shape(grad.shape) == (1, length, 1, 8)
    # The loss is one sum over all devices; nothing else is.
    collectives = re.findall(r"= (\S+) (?:all-|reduce-scatter|collective)", program.as_text())
    assert set(collectives) <= {"f32[]"}


def test_on_a_tpu_splash_is_three_kernels(monkeypatch):
    monkeypatch.setattr(device, "target_platform", lambda: "tpu")

    traced = gradients("auto").trace(*shapes(2, 256, 2, 20, "bfloat16"))

    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3  # forward, backward of q, of k and v
