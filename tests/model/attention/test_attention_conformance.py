"""Every backend computes the formula in float64, or says that it cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model.attention import flash, reference
from gptjax.model.attention.dispatch import BACKENDS, compute_attention
from gptjax.model.attention.mask import AttentionMask
from gptjax.runtime import device
from gptjax.runtime.device import target_platform

B, H, K = 2, 2, 8
LENGTHS = {"splash": 128}  # the shortest row of the TPU's kernel; of others SHORT
SHORT, NEW = 42, 5  # NEW queries read a cache
# bfloat16 keeps 8 bits. Weights, their gradients and the result are rounded once each,
# and the largest numbers here are below 4.
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-2}
CASES = ("causal", "not causal", "packed", "packed, not causal", "decode")
HERE = [name for name in BACKENDS if name != "cudnn"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "FLASH_BLOCK_SIZE", 16)  # does not divide SHORT
    monkeypatch.setattr(reference, "MAX_UNCHUNKED", 8)
    monkeypatch.setattr(reference, "MIN_CHUNK", 8)


def make_mask(case, length):
    """The mask, and what its attributes say, for each query and key."""
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (B, length))).astype(np.int32)
    slots = np.array([[0, 1, 2, 3, 4], [13, 14, 15, length - 2, length - 1]], np.int32)
    mask = AttentionMask(
        slots if case == "decode" else None,
        ids if "packed" in case else None,
        causal="not causal" not in case,
    )
    place_BT = slots if case == "decode" else np.arange(length)[None].repeat(B, 0)
    visible_BTS = np.ones((B, place_BT.shape[1], length), bool)
    for b, t, s in np.ndindex(visible_BTS.shape):
        foreign = "packed" in case and ids[b, s] != ids[b, t]
        visible_BTS[b, t, s] = not foreign and not (mask.causal and s > place_BT[b, t])
    return mask, visible_BTS


@functools.cache
def draw_arrays(case, length, dtype):
    """Queries, keys, values, gradient of the output (of one document if packed)."""
    rng, queries = np.random.default_rng(1), NEW if case == "decode" else length
    shapes = [(B, n, H, K) for n in (queries, length, length, queries)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    if case == "packed":
        arrays[3] *= (make_mask(case, length)[0].segment_id_BT == 2)[:, :, None, None]
    return [jnp.asarray(x, dtype) for x in arrays]


@functools.cache
def expected(case, length, dtype):
    """Output, and gradients of queries, keys and values."""
    query, key, value, grad = (np.asarray(x, float) for x in draw_arrays(case, length, dtype))
    score_BHTS = np.einsum("BTHK,BSHK->BHTS", query, key) / np.sqrt(K)
    weight_BHTS = np.exp(score_BHTS) * make_mask(case, length)[1][:, None]
    weight_BHTS /= weight_BHTS.sum(-1, keepdims=True)
    grad_BHTS = np.einsum("BTHK,BSHK->BHTS", grad, value)  # of the weights
    grad_BHTS = weight_BHTS * (grad_BHTS - (weight_BHTS * grad_BHTS).sum(-1, keepdims=True))
    grad_BHTS /= np.sqrt(K)
    return (
        np.einsum("BHTS,BSHK->BTHK", weight_BHTS, value),
        np.einsum("BHTS,BSHK->BTHK", grad_BHTS, key),
        np.einsum("BHTS,BTHK->BSHK", grad_BHTS, query),
        np.einsum("BHTS,BTHK->BSHK", weight_BHTS, grad),
    )


def check(backend, cases, dtype):
    """Compares all cases, of one program, which it returns with its arguments."""
    if backend == "splash" and target_platform() not in ("cpu", "tpu"):
        pytest.skip("the TPU's kernel needs one, or a CPU that interprets it")
    if backend == "cudnn" and target_platform() != "gpu":
        pytest.skip("cuDNN's attention needs an NVIDIA GPU from Ampere on")
    length = LENGTHS.get(backend, SHORT)

    @jax.jit
    def program(arrays):
        results = {}
        for case in cases:
            mask = jax.tree.map(jnp.asarray, make_mask(case, length)[0][:2])
            mask = AttentionMask(*mask, causal="not causal" not in case)
            attend = functools.partial(compute_attention, mask=mask, backend=backend)
            out_BTHK, pull = jax.vjp(attend, *arrays[case][:3])
            results[case] = (out_BTHK, *pull(arrays[case][3]))
        return results

    arrays = {case: draw_arrays(case, length, dtype) for case in cases}
    results = program(arrays)
    for case in cases:
        for found, wanted in zip(results[case], expected(case, length, dtype), strict=True):
            assert found.dtype == dtype
            np.testing.assert_allclose(
                *(np.asarray(found, float), wanted), rtol=0, atol=TOLERANCE[dtype], err_msg=case
            )
    return program, arrays, results


@pytest.mark.fast
@pytest.mark.parametrize("backend", HERE)
def test_a_backend_computes_the_formula_and_its_gradients(backend):
    cases = ("not causal", "packed") if backend == "splash" else CASES  # splash is slow here

    program, arrays, results = check(backend, cases, "float32")

    # No document has a gradient from another one, and large scores are finite.
    inside_BT = make_mask("packed", LENGTHS.get(backend, SHORT))[0].segment_id_BT == 2
    for grad in results["packed"][1:]:
        assert not np.asarray(grad)[~inside_BT].any()
        assert np.asarray(grad)[inside_BT].any()
    large = {case: [1e4 * query, *rest] for case, (query, *rest) in arrays.items()}
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(program(large)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_computes_the_formula_in_16_bits(backend):
    check(backend, CASES[:4] if backend == "cudnn" else ("packed",), "bfloat16")


def test_what_cudnn_is_asked_for_is_the_formula(monkeypatch):
    """Computed by XLA, which takes the same arguments."""
    attention = jax.nn.dot_product_attention

    def computed(*args, implementation, **options):
        assert implementation == "cudnn"
        return attention(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    monkeypatch.setattr(device, "target_platform", lambda: "gpu")

    check("cudnn", CASES, "bfloat16")
