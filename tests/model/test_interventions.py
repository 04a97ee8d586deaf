"""Capture points and interventions, against a recomputation in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import gptjax
from gptjax.model.interventions import POINT_MODULES
from gptjax.training.finetune import split_last_layers
from tests.small_models import make_model

MODEL = make_model(d_model=8, attention="flash")  # which has no weights to observe
MODEL.params["blocks"]["mlp"]["up"]["kernel"] *= 6  # GELU and its approximation differ at 2
CONFIG, T = MODEL.config, MODEL.config.context_length
N, D, K = 2, CONFIG.d_model, CONFIG.actual_head_dim
RNG = np.random.default_rng(0)
TOKEN_BT = jnp.asarray(RNG.integers(257, size=(3, T)), "int32")
B = len(TOKEN_BT)
ALL_POINTS = tuple(POINT_MODULES)


@functools.partial(jax.jit, static_argnames="capture")
def run(params, add=None, capture=ALL_POINTS):
    return gptjax.apply(CONFIG, params, TOKEN_BT, interventions=add, capture=capture)


def normalize(x_BTD, norm):
    mean, variance = x_BTD.mean(-1, keepdims=True), x_BTD.var(-1, keepdims=True)
    return (x_BTD - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]


def recompute(add):
    """Logits and activations of every point, in float64 NumPy."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), MODEL.params)
    found = {name: [] for name in ALL_POINTS}

    def point(name, value):
        value = value + add.get(name, np.zeros(N))[len(found[name])].astype(np.float64)
        found[name].append(value)
        return value

    def linear(layer, einsum, x):
        return np.einsum(einsum, x, layer["kernel"]) + layer["bias"]

    x_BTD = (
        p["token_embedding"]["embedding"][np.asarray(TOKEN_BT)]
        + p["position_embedding"]["embedding"]
    )
    for n in range(N):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        x_BTD = point("residual", x_BTD)
        y_BTD = normalize(x_BTD, block["attention_norm"])
        query_BTHK, key_BSHK, value_BSHK = (
            point(name, linear(attention[name], "BTD,DHK->BTHK", y_BTD))
            for name in ("query", "key", "value")
        )
        score_BHTS = np.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK) / np.sqrt(K)
        weight_BHTS = np.exp(np.where(np.tri(T, dtype=bool), score_BHTS, -np.inf))
        weight_BHTS = point("attention", weight_BHTS / weight_BHTS.sum(-1, keepdims=True))
        head_BTHK = point("head_output", np.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK))
        x_BTD = x_BTD + linear(attention["out"], "BTHK,HKD->BTD", head_BTHK)
        y_BTD = normalize(x_BTD, block["mlp_norm"])
        x_BTF = linear(mlp["up"], "BTD,DF->BTF", y_BTD)
        cubic = np.sqrt(2 / np.pi) * (x_BTF + 0.044715 * x_BTF**3)
        x_BTF = point("mlp_hidden", x_BTF * (1 + np.tanh(cubic)) / 2)
        x_BTD = x_BTD + point("mlp_output", linear(mlp["down"], "BTF,FD->BTD", x_BTF))
    logits = normalize(x_BTD, p["final_norm"]) @ p["token_embedding"]["embedding"].T
    return logits, {name: np.stack(values) for name, values in found.items()}


NOISE = {name: RNG.normal(size=x.shape).astype("f4") for name, x in recompute({})[1].items()}
ZEROS = {name: np.zeros_like(array[:, :1]) for name, array in NOISE.items()}


def assert_recomputed(result, add):
    logits, activations = result
    expected_logits, expected = recompute(add)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-3, atol=2e-4)
    for name in ALL_POINTS:
        np.testing.assert_allclose(
            activations[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_activations_are_those_of_a_recomputation_with_and_without_interventions():
    """All of one program: interventions of one row, which are added to each row."""
    row = {name: array[:, :1] / 3 for name, array in NOISE.items()}
    plain = run(MODEL.params, ZEROS)

    for add in ({}, *({name: row[name]} for name in ALL_POINTS), row):
        result = run(MODEL.params, ZEROS | add)
        assert_recomputed(result, add)
        assert not add or np.abs(result[0] - plain[0]).max() > 1e-2, [*add]

    # A tail of trainable layers has the same points.
    assert_recomputed(run(split_last_layers(MODEL.params, 1), row), row)
