"""Attention by one function: what is visible, what "auto" means, what is refused."""

import functools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model.attention.dispatch import BACKENDS, compute_attention, resolve_backend
from gptjax.model.attention.mask import AttentionMask, materialize_mask
from gptjax.model.attention.reference import attention_weights
from gptjax.model.gpt import apply_with_cache, hidden_states, init_cache
from gptjax.model.quantization import unstack_layers
from gptjax.runtime import device
from gptjax.runtime.device import GPU_PRE_AMPERE, target_platform
from tests.model.attention.test_attention_conformance import needs_tpu_or_cpu

B, T, H, K = 3, 8, 2, 4
SEGMENT_BT = jnp.array([[0] * 8, [0, 0, 0, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 1]])
SIGHTS = {
    "causal": AttentionMask(),
    "packed": AttentionMask(segment_id_BT=SEGMENT_BT),
    "window": AttentionMask(sliding_window=3),
    "slots": AttentionMask(query_position_BT=jnp.array([[0, 1], [3, 4], [6, 7]])),
}


def heads(queries=T, keys=T, dtype=jnp.float32):
    """Random queries, keys and values."""
    rngs = jax.random.split(jax.random.key(0), 3)
    lengths = (queries, keys, keys)
    return [
        jax.random.normal(rng, (B, length, H, K), dtype)
        for rng, length in zip(rngs, lengths, strict=True)
    ]


def mask_of(sight, rows=B, keys=T):
    queries = keys if sight.query_position_BT is None else sight.query_position_BT.shape[1]
    query_BTHK, key_BSHK = (jnp.zeros((rows, n, H, K)) for n in (queries, keys))
    return materialize_mask(sight, query_BTHK, key_BSHK)


# What is visible


@pytest.mark.fast
def test_a_query_sees_itself_and_what_came_before_it_in_its_document():
    sight = AttentionMask(segment_id_BT=jnp.array([[0, 0, 1, 1, 1]]), sliding_window=2)

    mask_TS = mask_of(sight, 1, 5)[0].astype(int)

    np.testing.assert_array_equal(
        mask_TS,
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]],
    )


@settings(max_examples=30)
@given(
    segments=st.lists(st.integers(-1, 3), min_size=9, max_size=9),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 10),
)
def test_every_query_sees_itself_whatever_else_is_hidden(segments, causal, window):
    size = len(segments)
    sight = AttentionMask(None, jnp.array([segments]), causal, window)

    mask_BTS = mask_of(sight, 1, size)

    assert jnp.all(jnp.diagonal(mask_BTS, axis1=1, axis2=2))


def test_slots_of_its_own_are_no_slots():
    query_position_BT = jnp.tile(jnp.arange(T), (B, 1))

    np.testing.assert_array_equal(
        mask_of(AttentionMask(query_position_BT)), mask_of(AttentionMask())
    )


@pytest.mark.parametrize("kind", SIGHTS)
def test_weights_sum_to_one_and_are_exactly_zero_where_masked(kind):
    mask_BTS = mask_of(SIGHTS[kind])
    query_BHTK, key_BHSK, _ = (jnp.swapaxes(x, 1, 2) for x in heads(mask_BTS.shape[1]))

    weight_BHTS = jax.jit(attention_weights)(query_BHTK, key_BHSK, mask_BTS)

    masked = np.broadcast_to(~np.asarray(mask_BTS)[:, None], weight_BHTS.shape)
    np.testing.assert_array_equal(np.asarray(weight_BHTS)[masked], 0)
    assert np.all(np.asarray(weight_BHTS)[~masked] > 0)
    np.testing.assert_allclose(weight_BHTS.sum(-1), 1, atol=1e-6)


DROPPING = ("reference", "chunked")


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_applied_to_the_normalised_weights(name):
    arrays = heads()

    doubled = compute_attention(
        *arrays, AttentionMask(), backend=name, edit_weights=lambda x: 2 * x
    )

    np.testing.assert_allclose(doubled, 2 * compute_attention(*arrays, AttentionMask()), rtol=1e-6)


# Which backend


ASK = functools.partial(resolve_backend, length=1024, head_dim=64, dtype="bfloat16")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, "chunked"),
        ("tpu", {}, "splash"),
        ("tpu", {"dtype": "float32"}, "splash"),
        ("tpu", {"length": 1000}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"length": 1001}, "xla"),
        ("gpu", {"head_dim": 60}, "xla"),
        ("gpu", {"head_dim": 136}, "xla"),
        (GPU_PRE_AMPERE, {}, "xla"),
        ("something new", {}, "xla"),
    ],
)
def test_auto_is_the_fastest_that_can_do_it(platform, changes, expected):
    assert ASK("auto", platform=platform, **changes) == expected
    # and where that cannot do something, another one does
    dropping = "chunked" if platform == "cpu" else "reference"
    assert ASK("auto", platform=platform, dropout=0.1, **changes) == dropping
    assert ASK("auto", platform=platform, decoding=True, **changes) == "reference"


@pytest.mark.fast
def test_a_named_backend_is_the_one_that_is_used():
    for name in ("reference", "chunked", "xla", "flash"):
        assert ASK(name) == name
    assert ASK("splash", platform="tpu") == "splash"
    assert ASK("cudnn", platform="gpu") == "cudnn"


def test_a_config_can_name_every_backend():
    names = get_args(get_type_hints(GPTConfig)["attention"])

    assert set(names) == {"auto", *BACKENDS}


class Gpu:
    """A device by its compute capability."""

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("7.5", GPU_PRE_AMPERE),  # Colab's T4
        ("8.0", "gpu"),
        ("10.0", "gpu"),
        ("gfx90a", GPU_PRE_AMPERE),
    ],
)
def test_a_gpu_is_one_that_has_cudnn_attention(capability, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)])

    assert target_platform() == expected


# What is refused


@pytest.mark.fast
@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in DROPPING])
def test_a_backend_that_cannot_drop_weights_says_so(name):
    use = "Use model.attention='.*' or model.dropout=0"
    message = f"model.attention='{name}' .* dropout. {use}"

    with pytest.raises(ConfigError, match=message):
        compute_attention(*heads(), AttentionMask(), backend=name, edit_weights=lambda x: x)
    with pytest.raises(ConfigError, match=message):
        ASK(name, dropout=0.1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("splash", {"decoding": True}, "'splash' .* KV cache .* Use model.attention="),
        ("splash", {"platform": "gpu"}, "'splash' needs a TPU, not gpu. Use .*auto"),
        ("splash", {"length": 100}, "'splash' .* multiple of 128, not 100. Use"),
        ("cudnn", {"platform": "tpu"}, "'cudnn' needs an NVIDIA GPU .* not tpu"),
        ("cudnn", {"platform": GPU_PRE_AMPERE}, "'cudnn' needs an NVIDIA GPU"),
        ("cudnn", {"dtype": "float32"}, "16-bit .* not float32. .*='bfloat16'"),
        ("cudnn", {"head_dim": 60}, "multiple of 8 up to 128, not 60. Use"),
        ("cudnn", {"head_dim": 256}, "multiple of 8 up to 128, not 256. Use"),
        ("cudnn", {"length": 127}, "even length, not 127 queries and 127 keys. Use"),
        ("slpash", {}, "model.attention='slpash' .* auto or one of .*xla, "),
    ],
)
def test_a_backend_that_cannot_do_it_says_what_can(name, changes, message):
    platform = {"cudnn": "gpu", "splash": "tpu"}.get(name, "cpu")

    with pytest.raises(ConfigError, match=message):
        ASK(name, **{"platform": platform, **changes})


def test_cudnn_that_is_not_there_is_a_mistake_of_the_config(monkeypatch):
    monkeypatch.setattr(device, "target_platform", lambda: "gpu")

    def missing(*args, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    arrays = [jnp.zeros((1, 2, 1, 8), jnp.bfloat16)] * 3

    with pytest.raises(ConfigError, match=r"'cudnn' failed: cuDNN .*xla"):
        compute_attention(*arrays, AttentionMask(), backend="cudnn")


@pytest.mark.parametrize(
    ("sight", "message"),
    [
        (AttentionMask(sliding_window=0), "=0 masks a query from itself. Use 1"),
        (
            AttentionMask(jnp.zeros((B, T), int), SEGMENT_BT),
            r"query_position_BT and segment_id_BT cannot be combined",
        ),
    ],
)
def test_a_sight_that_means_nothing_is_refused(sight, message):
    with pytest.raises(ConfigError, match=message):
        compute_attention(*heads(), sight)


def test_queries_that_do_not_say_where_they_stand_are_refused():
    with pytest.raises(ConfigError, match=r"2 queries .* 8 keys, .*query_position_BT"):
        compute_attention(*heads(queries=2), AttentionMask())


# In the model


ROW = 128  # tokens, the shortest row of the TPU's kernel
SHAPE = {"vocab_size": 20, "context_length": ROW, "n_layers": 1, "n_heads": 2}
SHAPE |= {"dtype": "float32"}  # on a GPU too


def tiny(backend):
    """A model whose backward computes all activations again."""
    return GPTConfig(**SHAPE, d_model=16, attention=backend, remat="full")


@functools.cache
def params_of(backend):
    return jax.jit(functools.partial(gptjax.init, tiny(backend)))(jax.random.key(0))


@functools.cache
def loss_and_slopes(backend):
    """Of packed rows."""
    token_BT = jax.random.randint(jax.random.key(1), (2, ROW), 0, 20)
    segment_id_BT = jnp.tile(jnp.arange(ROW) // 50, (2, 1))

    def loss(params):
        config = tiny(backend)
        logit_BTV = gptjax.apply(config, params, token_BT, segment_id_BT=segment_id_BT)
        return -jnp.sum(jax.nn.log_softmax(logit_BTV)[..., 0])

    return jax.jit(jax.value_and_grad(loss))(params_of("reference"))


@pytest.mark.parametrize("backend", ["chunked", "flash", "splash"])
def test_a_model_learns_the_same_by_every_backend(backend):
    needs_tpu_or_cpu(backend)
    results = loss_and_slopes(backend), loss_and_slopes("reference")

    # Sums over 256 tokens, of up to 10 each.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *results)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_a_model_starts_and_decodes_whatever_backend_its_rows_need(backend):
    config, params = tiny(backend), params_of(backend)
    token_BT = jnp.array([[3, 1, 4]])
    layers, cache = unstack_layers(params), init_cache(config, 1, 8)

    found, _ = apply_with_cache(config, layers, token_BT, jnp.array([[0, 1, 2]]), cache)

    expected, _ = hidden_states(tiny("reference"), params, token_BT)
    np.testing.assert_allclose(found, expected, atol=1e-5)
