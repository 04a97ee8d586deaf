"""Every backend computes what loops in float64 compute, or says that it cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import ConfigError
from gptjax.model.attention import flash, reference
from gptjax.model.attention.dispatch import BACKENDS, compute_attention
from gptjax.model.attention.mask import AttentionMask
from gptjax.runtime import device
from gptjax.runtime.device import target_platform

B, H, K = 2, 2, 8
LENGTHS = {"splash": 128}  # the shortest row of the TPU's kernel; of others SHORT
SHORT, NEW = 42, 5  # NEW queries read a cache
# bfloat16 keeps 8 bits, float16 11. Weights, their gradients and the result are rounded
# once each, and the largest numbers here are below 4.
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-2, "float16": 5e-3}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "FLASH_BLOCK_SIZE", 16)  # does not divide SHORT
    monkeypatch.setattr(reference, "MAX_UNCHUNKED", 8)
    monkeypatch.setattr(reference, "MIN_CHUNK", 8)


def make_masks(length):
    """Masks by case."""
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (B, length))).astype(np.int32)
    slots = np.array([[0, 1, 2, 3, 4], [13, 14, 15, length - 2, length - 1]], np.int32)
    return {
        "causal": AttentionMask(),
        "not causal": AttentionMask(causal=False),
        "packed": AttentionMask(segment_id_BT=ids),
        "window": AttentionMask(sliding_window=20),
        "window, not causal": AttentionMask(sliding_window=20, causal=False),
        "decode": AttentionMask(slots),
    }


def visible_keys(mask, length, b, t):
    """Keys of query t of row b, by the words of `AttentionMask`."""
    place = t if mask.query_position_BT is None else mask.query_position_BT[b, t]
    for s in range(length):
        later = s > place
        far = mask.sliding_window is not None and s <= place - mask.sliding_window
        foreign = mask.segment_id_BT is not None and (
            mask.segment_id_BT[b, s] != mask.segment_id_BT[b, t]
        )
        if not (foreign or far or (later and mask.causal)):
            yield s


def looped(mask, query_BTHK, key_BSHK, value_BSHK, grad_BTHK):
    """Output, and gradients of the three, one query of one head at a time."""
    out_BTHK = np.zeros(query_BTHK.shape)
    grads = [np.zeros(x.shape) for x in (query_BTHK, key_BSHK, value_BSHK)]
    for b, t, h in np.ndindex(query_BTHK.shape[:3]):
        seen = list(visible_keys(mask, key_BSHK.shape[1], b, t))
        query, grad = query_BTHK[b, t, h], grad_BTHK[b, t, h]
        keys, values = key_BSHK[b, seen, h], value_BSHK[b, seen, h]
        weights = np.exp(keys @ query / np.sqrt(K))
        weights /= weights.sum()
        out_BTHK[b, t, h] = weights @ values
        # The Jacobian of the softmax is diag(w) - w w^T.
        changes = (np.diag(weights) - np.outer(weights, weights)) @ (values @ grad)
        grads[0][b, t, h] += changes @ keys / np.sqrt(K)
        grads[1][b, seen, h] += np.outer(changes, query) / np.sqrt(K)
        grads[2][b, seen, h] += np.outer(weights, grad)
    return out_BTHK, *grads


def draw_arrays(case, length, dtype):
    """Queries, keys, values, and the gradient of the output."""
    rng, queries = np.random.default_rng(1), NEW if case == "decode" else length
    shapes = [(B, n, H, K) for n in (queries, length, length, queries)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.cache
def expected(case, length, dtype):
    arrays = [np.asarray(x, float) for x in draw_arrays(case, length, dtype)]
    return looped(make_masks(length)[case], *arrays)


@functools.cache
def make_program(backend, cases):
    """One program of all cases: {case: arrays} -> {case: output and gradients}."""
    masks = make_masks(LENGTHS.get(backend, SHORT))

    def attend(case, *heads):
        mask = jax.tree.map(
            lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, masks[case]
        )
        return compute_attention(*heads, mask, backend=backend)

    def run(arrays):
        results = {}
        for case in cases:
            *heads, grad_BTHK = arrays[case]
            out_BTHK, pull = jax.vjp(functools.partial(attend, case), *heads)
            results[case] = (out_BTHK, *pull(grad_BTHK))
        return results

    return jax.jit(run)


def check(backend, cases, dtype):
    length = LENGTHS.get(backend, SHORT)
    arrays = {case: draw_arrays(case, length, dtype) for case in cases}

    results = make_program(backend, cases)(arrays)

    for case in cases:
        for found, wanted in zip(results[case], expected(case, length, dtype), strict=True):
            assert found.dtype == dtype
            np.testing.assert_allclose(
                *(np.asarray(found, float), wanted), rtol=0, atol=TOLERANCE[dtype], err_msg=case
            )


ROW_CASES = tuple(case for case in make_masks(SHORT) if case != "decode")
ALL_CASES = (*ROW_CASES, "decode")
HERE = [name for name in BACKENDS if name != "cudnn"]


def cases_of(backend):
    return ROW_CASES[1:] if backend == "splash" else ALL_CASES  # splash is slow here


def skip_unless_supported(backend):
    if backend == "splash" and target_platform() not in ("cpu", "tpu"):
        pytest.skip("the TPU's kernel needs one, or a CPU that interprets it")
    if backend == "cudnn" and target_platform() != "gpu":
        pytest.skip("cuDNN's attention needs an NVIDIA GPU from Ampere on")


@pytest.mark.fast
@pytest.mark.parametrize("backend", HERE)
def test_a_backend_computes_the_formula_and_its_gradients(backend):
    skip_unless_supported(backend)

    check(backend, cases_of(backend), "float32")


@pytest.mark.parametrize(
    ("backend", "dtype"), [*((name, "bfloat16") for name in BACKENDS), ("cudnn", "float16")]
)
def test_a_backend_computes_the_formula_in_16_bits(backend, dtype):
    skip_unless_supported(backend)

    check(backend, ROW_CASES if backend == "cudnn" else ("packed",), dtype)


@pytest.mark.fast
@pytest.mark.parametrize("backend", HERE)
def test_no_document_has_a_gradient_from_another_one_and_large_scores_are_finite(backend):
    skip_unless_supported(backend)
    cases, length = cases_of(backend), LENGTHS.get(backend, SHORT)
    arrays = {case: draw_arrays(case, length, "float32") for case in cases}
    inside_BT = make_masks(length)["packed"].segment_id_BT == 2
    arrays["packed"][3] *= inside_BT[:, :, None, None]
    program = make_program(backend, cases)  # of the test above

    for grad in program(arrays)["packed"][1:]:
        assert not np.asarray(grad)[~inside_BT].any()
        assert np.asarray(grad)[inside_BT].any()
    large = {case: [1e4 * query, *rest] for case, (query, *rest) in arrays.items()}
    for x in jax.tree.leaves(program(large)):
        assert np.all(np.isfinite(x))


def test_what_cudnn_is_asked_for_is_the_formula(monkeypatch):
    """Computed by XLA, which takes the same arguments."""
    attention = jax.nn.dot_product_attention

    def computed(*args, implementation, **options):
        assert implementation == "cudnn"
        return attention(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    monkeypatch.setattr(device, "target_platform", lambda: "gpu")

    check("cudnn", ALL_CASES, "bfloat16")


def test_cudnn_itself_reads_a_cache():
    """Forward alone: it has no gradients for an odd number of queries."""
    skip_unless_supported("cudnn")
    *heads, _ = draw_arrays("decode", SHORT, "bfloat16")
    mask = AttentionMask(jnp.asarray(make_masks(SHORT)["decode"].query_position_BT))

    out_BTHK = compute_attention(*heads, mask, backend="cudnn")

    wanted_BTHK = expected("decode", SHORT, "bfloat16")[0]
    np.testing.assert_allclose(np.asarray(out_BTHK, float), wanted_BTHK, rtol=0, atol=4e-2)
    with pytest.raises(ConfigError, match="'cudnn' failed"):
        check("cudnn", ("decode",), "bfloat16")
