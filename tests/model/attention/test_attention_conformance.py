"""Every backend computes what loops in float64 compute, or says that it cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import ConfigError
from gptjax.model.attention import flash
from gptjax.model.attention.dispatch import BACKENDS, compute_attention
from gptjax.model.attention.mask import AttentionMask
from gptjax.runtime import device
from gptjax.runtime.device import target_platform

B, T, H, K = 2, 128, 2, 8
BLOCK = 48  # does not divide T
SHORT = 5  # queries that read a cache
SEGMENT_BT = np.sort(np.random.default_rng(0).integers(0, 5, (B, T))).astype(np.int32)
PADDED_BT = (np.arange(T) < [[T - 40], [T]]).astype(np.int32)
SLOT_BT = np.array([[0, 1, 2, 3, 4], [60, 61, 62, 126, 127]], np.int32)
CASES = {
    "causal": AttentionMask(),
    "non-causal": AttentionMask(causal=False),
    "packed": AttentionMask(segment_id_BT=SEGMENT_BT),
    "packed, non-causal": AttentionMask(segment_id_BT=SEGMENT_BT, causal=False),
    "padded": AttentionMask(segment_id_BT=PADDED_BT),
    "window": AttentionMask(sliding_window=20),
    "window, packed": AttentionMask(segment_id_BT=SEGMENT_BT, sliding_window=20),
    "window, non-causal": AttentionMask(sliding_window=20, causal=False),
    "decode": AttentionMask(SLOT_BT),
}
# bfloat16 keeps 8 bits. Weights, their slopes and the result are rounded once each,
# and the largest numbers here are below 4.
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-2}
HALF = {**TOLERANCE, "float16": 5e-3}  # keeps 11 bits, so eight times as many places
LIGHT = {"packed", "window", "decode"}
COMBINED = {"packed, non-causal", "window, non-causal"}  # seen in float32 only


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "FLASH_BLOCK_SIZE", BLOCK)


def seen_keys(sight, b, t):
    """What query t of row b may see, by the words of `Sight`."""
    place = t if sight.query_position_BT is None else sight.query_position_BT[b, t]
    for s in range(T):
        later = s > place
        far = sight.sliding_window is not None and s <= place - sight.sliding_window
        foreign = sight.segment_id_BT is not None and (
            sight.segment_id_BT[b, s] != sight.segment_id_BT[b, t]
        )
        if not (foreign or far or (later and sight.causal)):
            yield s


def looped(sight, query_BTHK, key_BSHK, value_BSHK, slope_BTHK):
    """Output, and slopes of the three, one query of one head at a time."""
    mixed_BTHK = np.zeros(query_BTHK.shape)
    slopes = [np.zeros(x.shape) for x in (query_BTHK, key_BSHK, value_BSHK)]
    for b, t, h in np.ndindex(query_BTHK.shape[:3]):
        seen = list(seen_keys(sight, b, t))
        query, slope = query_BTHK[b, t, h], slope_BTHK[b, t, h]
        keys, values = key_BSHK[b, seen, h], value_BSHK[b, seen, h]
        weights = np.exp(keys @ query / np.sqrt(K))
        weights /= weights.sum()
        mixed_BTHK[b, t, h] = weights @ values
        # The softmax's Jacobian is diag(w) - w w^T.
        changes = (np.diag(weights) - np.outer(weights, weights)) @ (values @ slope)
        slopes[0][b, t, h] += changes @ keys / np.sqrt(K)
        slopes[1][b, seen, h] += np.outer(changes, query) / np.sqrt(K)
        slopes[2][b, seen, h] += np.outer(weights, slope)
    return mixed_BTHK, *slopes


def arrays(case, dtype):
    """Queries, keys, values, and slopes of the output."""
    rng = np.random.default_rng(1)
    lengths = (SHORT if case == "decode" else T, T, T)
    shapes = [(B, length, H, K) for length in (*lengths, lengths[0])]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.cache
def expected(case, dtype):
    return looped(CASES[case], *(np.asarray(x, float) for x in arrays(case, dtype)))


def results(attention, numbers, places, *heads_and_slope):
    """As `looped`, by a backend."""
    *heads, slope_BTHK = heads_and_slope
    places = [None if place is None else jnp.asarray(place) for place in places]
    sight = AttentionMask(*places, *numbers)
    mixed_BTHK, pull = jax.vjp(lambda *heads: attention(*heads, sight), *heads)
    return mixed_BTHK, *pull(slope_BTHK)


compiled_results = jax.jit(results, static_argnums=(0, 1))


def results_of(backend, *args):
    """Whole programs where there are loops; else single operations, which one case
    after the other takes from JAX's cache.
    """
    run = compiled_results if backend in ("flash", "splash") else results
    return run(named(backend), *args)


def check(backend, case, dtype):
    sight = CASES[case]

    found = results_of(backend, sight[2:], sight[:2], *arrays(case, dtype))

    for mine, theirs in zip(found, expected(case, dtype), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, float), theirs, rtol=0, atol=HALF[dtype])


def refusal(backend, case, dtype):
    """What a backend answers to what it cannot do, on the machine of the test."""
    if backend == "splash" and target_platform() not in ("cpu", "tpu"):
        return "needs a TPU" if case != "decode" else "KV cache"
    if backend == "splash" and case == "decode":
        return "KV cache"
    if backend == "cudnn" and target_platform() != "gpu":
        return "needs an NVIDIA GPU"
    if backend == "cudnn" and dtype == "float32":
        return "needs a 16-bit dtype"
    if backend == "cudnn" and case == "decode":
        return "'cudnn' failed"  # it has no slopes for an odd number of queries
    return ""


def needs_tpu_or_cpu(backend):
    if backend == "splash" and target_platform() not in ("cpu", "tpu"):
        pytest.skip("the TPU's kernel needs one, or a CPU that interprets it")


def needs_cudnn():
    if target_platform() != "gpu":
        pytest.skip("cuDNN's attention needs an NVIDIA GPU from Ampere on")


@functools.cache
def named(backend):
    """One function for all tests, so that what is compiled is compiled once."""
    return functools.partial(compute_attention, backend=backend)


def each_case(backends):
    return pytest.mark.parametrize(
        ("backend", "case", "dtype"),
        [
            pytest.param(
                *(backend, case, dtype),
                marks=[pytest.mark.fast] * (case in LIGHT and dtype == "float32"),
            )
            for backend in backends
            for case in CASES
            for dtype in TOLERANCE
            if dtype == "float32" or case not in COMBINED
        ],
    )


@each_case(BACKENDS)
def test_a_backend_computes_the_formula_and_its_slopes_or_says_why_not(backend, case, dtype):
    if problem := refusal(backend, case, dtype):
        with pytest.raises(ConfigError, match=problem):
            check(backend, case, dtype)
    else:
        check(backend, case, dtype)


@pytest.mark.parametrize("length", [1, 33, 70, 127])
def test_rows_of_any_length_have_no_query_without_a_block(length):
    heads = [x[:, :length] for x in arrays("causal", "float32")[:3]]

    mixed_BTHK = named("chunked")(*heads, AttentionMask())

    expected_BTHK = expected("causal", "float32")[0][:, :length]
    np.testing.assert_allclose(mixed_BTHK, expected_BTHK, rtol=0, atol=5e-6)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """What cuDNN is asked for, computed by XLA: it takes the same arguments."""
    attention = jax.nn.dot_product_attention

    def computed(*args, implementation, **options):
        assert implementation == "cudnn"
        return attention(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    monkeypatch.setattr(device, "target_platform", lambda: "gpu")


@pytest.mark.usefixtures("cudnn_by_xla")
@pytest.mark.parametrize("case", CASES)
def test_what_cudnn_is_asked_for_is_the_formula(case):
    check("cudnn", case, "bfloat16")


@pytest.mark.parametrize("case", [case for case in CASES if case != "decode"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_itself_computes_the_formula_and_its_slopes(case, dtype):
    needs_cudnn()

    check("cudnn", case, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_itself_reads_a_cache(dtype):
    """Forward alone: nothing learns while it writes."""
    needs_cudnn()
    *heads, _ = arrays("decode", dtype)

    mixed_BTHK = named("cudnn")(*heads, AttentionMask(jnp.asarray(SLOT_BT)))

    np.testing.assert_allclose(
        np.asarray(mixed_BTHK, float), expected("decode", dtype)[0], rtol=0, atol=HALF[dtype]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_itself_hides_documents_from_each_other(dtype):
    """As below, where numbers of 16 bits that are hidden are exactly zero too."""
    needs_cudnn()
    *heads, slope_BTHK = arrays("packed", dtype)
    inside_BT = SEGMENT_BT == 2
    slope_BTHK *= inside_BT[:, :, None, None].astype(dtype)

    _, *slopes = results_of("cudnn", (True, None), (None, SEGMENT_BT), *heads, slope_BTHK)

    for slope in slopes:
        assert not np.asarray(slope)[~inside_BT].any()
        assert np.asarray(slope)[inside_BT].any()


@pytest.mark.fast
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked", "xla", "flash", "splash"])
def test_no_document_has_a_slope_by_another_one(backend, causal):
    needs_tpu_or_cpu(backend)
    *heads, slope_BTHK = arrays("packed", "float32")
    inside_BT = SEGMENT_BT == 2
    slope_BTHK *= inside_BT[:, :, None, None]

    _, *slopes = results_of(backend, (causal, None), (None, SEGMENT_BT), *heads, slope_BTHK)

    for slope in slopes:
        assert not np.asarray(slope)[~inside_BT].any()
        assert np.asarray(slope)[inside_BT].any()


@pytest.mark.parametrize("backend", ["reference", "chunked", "xla", "flash", "splash"])
def test_scores_too_large_for_exp_do_not_overflow(backend):
    needs_tpu_or_cpu(backend)
    query_BTHK, *rest = arrays("packed", "float32")

    found = results_of(backend, (True, None), (None, SEGMENT_BT), 1e4 * query_BTHK, *rest)

    assert all(jnp.all(jnp.isfinite(x)) for x in found)
