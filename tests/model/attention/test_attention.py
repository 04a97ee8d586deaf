"""Attention by one function: what "auto" means, and what is refused."""

import dataclasses
import functools
import types
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model.attention.dispatch import BACKENDS, compute_attention, select_backend
from gptjax.model.attention.mask import AttentionMask, AttentionSpec
from gptjax.model.gpt import apply_with_cache, init_cache, resolve_backend
from gptjax.model.quantization import unstack_layers
from gptjax.runtime.device import GPU_PRE_AMPERE, target_platform

SPEC = AttentionSpec(1024, 1024, 64, "bfloat16", "cpu")
LIKE_SPEC = GPTConfig(d_model=64, n_heads=1, dtype="bfloat16")
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # of others: "cpu"


def with_length(length):
    return {"num_queries": length, "num_keys": length}


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, "chunked"),
        ("tpu", {}, "splash"),
        ("tpu", {"dtype": "float32"}, "splash"),
        ("tpu", with_length(1000), "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", with_length(1001), "xla"),
        (GPU_PRE_AMPERE, {}, "xla"),
        ("something new", {}, "xla"),
    ],
)
def test_auto_is_the_fastest_that_supports_the_call(platform, changes, expected):
    spec = SPEC._replace(platform=platform, **changes)

    assert select_backend("auto", spec) == expected
    with_dropout = "chunked" if platform == "cpu" else "reference"
    assert select_backend("auto", spec._replace(edits_weights=True)) == with_dropout
    assert select_backend("auto", spec._replace(has_query_positions=True)) == "reference"
    if not changes:
        assert resolve_backend(LIKE_SPEC, platform) == expected
        assert (
            resolve_backend(dataclasses.replace(LIKE_SPEC, dropout=0.1), platform) == with_dropout
        )


def test_a_config_can_name_every_backend_and_a_gpu_is_one_that_has_cudnn_attention(monkeypatch):
    assert {*get_args(get_type_hints(GPTConfig)["attention"])} == {"auto", *BACKENDS}
    for name in BACKENDS:
        assert select_backend(name, SPEC._replace(platform=PLATFORMS.get(name, "cpu"))) == name
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability in ("7.5", "8.0", "10.0", "gfx90a"):  # 7.5 is Colab's T4
        gpu = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
        expected = "gpu" if capability in ("8.0", "10.0") else GPU_PRE_AMPERE
        assert target_platform() == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("splash", {"has_query_positions": True}, "'splash' .*query_position_BT"),
        ("splash", with_length(100), "'splash' .* 128, not 100.*'xla'"),
        ("cudnn", {"platform": "tpu"}, "'cudnn' .* tpu.*'xla'"),
        ("cudnn", {"dtype": "float32"}, "'cudnn' .*float32.*model.dtype='bfloat16'"),
        ("cudnn", {"head_dim": 256}, "'cudnn' .*128, not 256.*model.n_heads"),
        ("cudnn", {"edits_weights": True}, "'cudnn' .*model.dropout=0"),
        ("slpash", {}, "model.attention='slpash' .*auto.*xla"),
    ],
)
def test_a_backend_that_does_not_support_a_call_names_another(name, changes, message):
    spec = SPEC._replace(**{"platform": PLATFORMS.get(name, "cpu"), **changes})

    with pytest.raises(ConfigError, match=message):
        select_backend(name, spec)


def test_edits_such_as_dropout_change_the_normalized_weights():
    arrays = np.random.default_rng(0).normal(size=(3, 2, 8, 2, 4)).astype("f4")
    attend = functools.partial(compute_attention, *map(jnp.asarray, arrays), AttentionMask())

    for name in ("reference", "chunked"):
        edited = attend(backend=name, edit_weights=lambda weight_BHTS: 2 * weight_BHTS)
        np.testing.assert_allclose(edited, 2 * attend(backend="xla"), rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked", "xla", "flash"])
def test_consecutive_heads_of_queries_share_a_head_of_keys_and_values(backend):
    random = np.random.default_rng(0)
    query_BTHK, key_BSGK, value_BSGK = (
        jnp.asarray(random.normal(size=(2, 8, heads, 4)), "float32") for heads in (6, 2, 2)
    )
    cases = [(8, AttentionMask())]
    if backend == "reference":  # of a KV cache
        cases.append((3, AttentionMask(jnp.array([[4, 5, 6], [0, 1, 2]]))))

    for queries, mask in cases:
        found_BTHK = compute_attention(
            query_BTHK[:, :queries], key_BSGK, value_BSGK, mask, backend=backend
        )
        for head in range(6):
            query_BT1K, key_BS1K, value_BS1K = (
                x[:, :, n : n + 1]
                for x, n in (
                    (query_BTHK[:, :queries], head),
                    (key_BSGK, head // 3),
                    (value_BSGK, head // 3),
                )
            )
            alone = compute_attention(query_BT1K, key_BS1K, value_BS1K, mask, backend="reference")
            np.testing.assert_allclose(found_BTHK[:, :, head], alone[:, :, 0], atol=1e-5)


def test_contradictory_masks_are_refused():
    key, place_BT = jnp.zeros((1, 8, 1, 8)), jnp.array([[3, 4]])

    for mask in (AttentionMask(place_BT, place_BT), AttentionMask()):
        with pytest.raises(ConfigError, match="query_position_BT"):
            compute_attention(key[:, :2], key, key, mask)


@pytest.mark.parametrize("backend", PLATFORMS)
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
