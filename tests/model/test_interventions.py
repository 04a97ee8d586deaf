"""Capture points and interventions, against a recomputation in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.model.interventions import POINT_MODULES
from gptjax.training.finetune import split_last_layers
from tests.small_models import LLAMA, make_model

GPT2 = make_model(d_model=8, attention="flash")  # which has no weights to observe
GPT2.params["blocks"]["mlp"]["up"]["kernel"] *= 6  # GELU and its approximation differ at 2
MODELS = {"gpt2": GPT2, "llama": make_model(d_model=8, attention="flash", **LLAMA)}
MODELS["relu2"] = make_model(d_model=8, mlp="relu2", std=0.3)
N, T = GPT2.config.n_layers, GPT2.config.context_length
RNG = np.random.default_rng(0)
TOKEN_BT = jnp.asarray(RNG.integers(257, size=(3, T)), "int32")
ALL_POINTS = tuple(POINT_MODULES)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, add):
    return gptjax.apply(config, params, TOKEN_BT, interventions=add, capture=ALL_POINTS)


def normalize(c, x, norm):
    if c.norm == "rms" or "bias" not in norm:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * norm["scale"]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + c.norm_eps) * norm["scale"] + norm["bias"]


def linear(layer, einsum, x):
    return np.einsum(einsum, x, layer["kernel"]) + layer.get("bias", 0)


def rotate(c, x_BTHK):
    """Rotates pairs as complex numbers; Llama 3's formula, one frequency at a time."""
    half, old, low, high = c.head_dim // 2, c.rope_original_context, 1, 4
    freqs = []
    for freq in c.rope_theta ** (-2 * np.arange(half) / c.head_dim):
        wavelength = 2 * np.pi / freq
        smooth = (old / wavelength - low) / (high - low)
        between = (1 - smooth) * freq / c.rope_factor + smooth * freq
        is_long = wavelength > old / low
        freqs.append(
            freq if wavelength < old / high else freq / c.rope_factor if is_long else between
        )
    angle_T1P = (np.arange(T)[:, None] * np.array(freqs))[:, None]
    z_BTHP = (x_BTHK[..., :half] + 1j * x_BTHK[..., half:]) * np.exp(1j * angle_T1P)
    return np.concatenate([z_BTHP.real, z_BTHP.imag], axis=-1)


def hidden_activation(c, mlp, y_BTD):
    x_BTF = linear(mlp["up"], "BTD,DF->BTF", y_BTD)
    if c.mlp == "swiglu":
        gate_BTF = linear(mlp["gate"], "BTD,DF->BTF", y_BTD)
        return x_BTF * gate_BTF / (1 + np.exp(-gate_BTF))
    if c.mlp == "relu2":
        return np.maximum(x_BTF, 0) ** 2
    cubic = np.sqrt(2 / np.pi) * (x_BTF + 0.044715 * x_BTF**3)
    return x_BTF * (1 + np.tanh(cubic)) / 2


@functools.cache
def params64(name):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), MODELS[name].params)


def recompute(name, add):
    """Logits and activations of every point, in float64 NumPy."""
    c, p = MODELS[name].config, params64(name)
    found = {point: [] for point in ALL_POINTS}

    def point(name, value):
        value = value + add.get(name, np.zeros(N))[len(found[name])].astype(np.float64)
        found[name].append(value)
        return value

    x_BTD = p["token_embedding"]["embedding"][np.asarray(TOKEN_BT)]
    if c.position == "learned":
        x_BTD = x_BTD + p["position_embedding"]["embedding"]
    for n in range(N):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        x_BTD = point("residual", x_BTD)
        y_BTD = normalize(c, x_BTD, block["attention_norm"])
        query_BTHK, key_BSHK, value_BSHK = (
            point(name, linear(attention[name], "BTD,DHK->BTHK", y_BTD))
            for name in ("query", "key", "value")
        )
        if c.qk_norm:
            query_BTHK = normalize(c, query_BTHK, attention["query_norm"])
            key_BSHK = normalize(c, key_BSHK, attention["key_norm"])
        if c.position == "rope":
            query_BTHK, key_BSHK = rotate(c, query_BTHK), rotate(c, key_BSHK)
        group = [head // (c.n_heads // c.actual_kv_heads) for head in range(c.n_heads)]
        key_BSHK, value_BSHK = key_BSHK[:, :, group], value_BSHK[:, :, group]
        score_BHTS = np.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK)
        score_BHTS /= np.sqrt(query_BTHK.shape[-1])
        weight_BHTS = np.exp(np.where(np.tri(T, dtype=bool), score_BHTS, -np.inf))
        weight_BHTS = point("attention", weight_BHTS / weight_BHTS.sum(-1, keepdims=True))
        head_BTHK = point("head_output", np.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK))
        x_BTD = x_BTD + linear(attention["out"], "BTHK,HKD->BTD", head_BTHK)
        x_BTF = hidden_activation(c, mlp, normalize(c, x_BTD, block["mlp_norm"]))
        x_BTF = point("mlp_hidden", x_BTF)
        x_BTD = x_BTD + point("mlp_output", linear(mlp["down"], "BTF,FD->BTD", x_BTF))
    logits = normalize(c, x_BTD, p["final_norm"]) @ p["token_embedding"]["embedding"].T
    return logits, {name: np.stack(values) for name, values in found.items()}


def assert_recomputed(result, name, add):
    logits, activations = result
    expected_logits, expected = recompute(name, add)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-3, atol=2e-4)
    for name in ALL_POINTS:
        np.testing.assert_allclose(
            activations[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name
        )


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_of_a_recomputation_with_and_without_interventions(name):
    """All of one program: interventions of one row, which are added to each row."""
    model = MODELS[name]
    shapes = {point: x[:, :1].shape for point, x in recompute(name, {})[1].items()}
    row = {point: RNG.normal(size=shape).astype("f4") / 3 for point, shape in shapes.items()}
    zeros = {point: np.zeros(shape, np.float32) for point, shape in shapes.items()}
    plain = run(model.config, model.params, zeros)

    for add in ({}, *({point: row[point]} for point in ALL_POINTS), row):
        result = run(model.config, model.params, zeros | add)
        assert_recomputed(result, name, add)
        assert not add or np.abs(result[0] - plain[0]).max() > 1e-2, [*add]

    # A tail of trainable layers has the same points.
    result = run(model.config, split_last_layers(model.params, 1), row)
    assert_recomputed(result, name, row)
