"""Attention by one function: what is visible, what "auto" means, what is refused."""

import functools
import types
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
from gptjax.model.gpt import apply_with_cache, init_cache
from gptjax.model.quantization import unstack_layers
from gptjax.runtime import device
from gptjax.runtime.device import GPU_PRE_AMPERE, target_platform
from tests.model.attention.test_attention_conformance import visible_keys

B, T, H, K = 3, 8, 2, 4
POSITION_BT = np.array([[0, 1], [3, 4], [6, 7]])
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # of others: "cpu"


def draw_heads(queries=T):
    """Random queries, keys and values."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, n, H, K)), "float32") for n in (queries, T, T)]


@settings(max_examples=25)
@given(
    segments=st.none() | st.lists(st.integers(-1, 3), min_size=9, max_size=9),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 10),
)
def test_a_mask_is_what_its_words_say_and_a_query_always_sees_itself(segments, causal, window):
    segment_id_BT = None if segments is None else jnp.array([segments])
    mask, x_BTHK = AttentionMask(None, segment_id_BT, causal, window), jnp.zeros((1, 9, 1, 1))

    found_TS = np.asarray(materialize_mask(mask, x_BTHK, x_BTHK))[0]

    for t in range(9):
        assert np.flatnonzero(found_TS[t]).tolist() == [*visible_keys(mask, 9, 0, t)]
    assert np.all(np.diagonal(found_TS))


resolve = functools.partial(resolve_backend, length=1024, head_dim=64, dtype="bfloat16")


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
def test_auto_is_the_fastest_that_supports_the_call(platform, changes, expected):
    assert resolve("auto", platform=platform, **changes) == expected
    with_dropout = "chunked" if platform == "cpu" else "reference"
    assert resolve("auto", platform=platform, dropout=0.1, **changes) == with_dropout
    assert resolve("auto", platform=platform, decoding=True, **changes) == "reference"


def test_a_config_can_name_every_backend_and_gets_it():
    assert {*get_args(get_type_hints(GPTConfig)["attention"])} == {"auto", *BACKENDS}
    for name in BACKENDS:
        assert resolve(name, platform=PLATFORMS.get(name, "cpu")) == name


def test_a_gpu_is_one_that_has_cudnn_attention(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, expected in (
        ("7.5", GPU_PRE_AMPERE),  # Colab's T4
        ("8.0", "gpu"),
        ("10.0", "gpu"),
        ("gfx90a", GPU_PRE_AMPERE),
    ):
        gpu = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
        assert target_platform() == expected


@pytest.mark.fast
@pytest.mark.parametrize("name", BACKENDS)
def test_dropout_is_applied_to_the_normalized_weights_or_refused(name):
    arrays, mask = draw_heads(), AttentionMask()
    edit = functools.partial(
        compute_attention, mask=mask, backend=name, edit_weights=lambda x: 2 * x
    )

    if name in ("reference", "chunked"):
        expected = compute_attention(*arrays, mask, backend="reference")
        np.testing.assert_allclose(edit(*arrays), 2 * expected, rtol=1e-5)
        return
    for run in (lambda: edit(*arrays), lambda: resolve(name, dropout=0.1)):
        with pytest.raises(ConfigError, match=f"model.attention='{name}' .*model.dropout=0"):
            run()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("splash", {"decoding": True}, "'splash' .*query_position_BT"),
        ("splash", {"platform": "gpu"}, "'splash' .* gpu.*'auto'"),
        ("splash", {"length": 100}, "'splash' .* 128, not 100.*'xla'"),
        ("cudnn", {"platform": "tpu"}, "'cudnn' .* tpu.*'xla'"),
        ("cudnn", {"platform": GPU_PRE_AMPERE}, "'cudnn' .*'xla'"),
        ("cudnn", {"dtype": "float32"}, "'cudnn' .*float32.*model.dtype='bfloat16'"),
        ("cudnn", {"head_dim": 60}, "'cudnn' .*128, not 60.*model.n_heads"),
        ("cudnn", {"head_dim": 256}, "'cudnn' .*128, not 256.*model.n_heads"),
        ("cudnn", {"length": 127}, "'cudnn' .*127 queries and 127 keys"),
        ("slpash", {}, "model.attention='slpash' .*auto.*xla"),
    ],
)
def test_a_backend_that_does_not_support_a_call_names_another(name, changes, message):
    platform = PLATFORMS.get(name, "cpu")

    with pytest.raises(ConfigError, match=message):
        resolve(name, **{"platform": platform, **changes})


def test_missing_cudnn_is_a_mistake_of_the_config(monkeypatch):
    monkeypatch.setattr(device, "target_platform", lambda: "gpu")

    def fail(*args, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", fail)
    arrays = [jnp.zeros((1, 2, 1, 8), jnp.bfloat16)] * 3

    with pytest.raises(ConfigError, match=r"'cudnn' .*cuDNN is not detected.*'xla'"):
        compute_attention(*arrays, AttentionMask(), backend="cudnn")


@pytest.mark.parametrize(
    ("queries", "mask", "message"),
    [
        (T, AttentionMask(sliding_window=0), "sliding_window=0"),
        (2, AttentionMask(POSITION_BT, POSITION_BT), "query_position_BT and segment_id_BT"),
        (2, AttentionMask(), r"2 queries .* 8 keys, .*query_position_BT"),
    ],
)
def test_a_contradictory_mask_is_refused(queries, mask, message):
    with pytest.raises(ConfigError, match=message):
        compute_attention(*draw_heads(queries), mask)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_a_model_starts_and_decodes_whatever_backend_its_rows_need(backend):
    shape = {"vocab_size": 20, "context_length": 8, "n_layers": 1, "n_heads": 2, "d_model": 16}
    config = GPTConfig(**shape, attention=backend)

    params = jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0)))
    x_BTD, _ = jax.eval_shape(
        functools.partial(apply_with_cache, config),
        *(jax.eval_shape(unstack_layers, params), jnp.array([[3, 1, 4]]), jnp.array([[0, 1, 2]])),
        init_cache(config, 1, 8),
    )

    assert x_BTD.shape == (1, 3, 16)
