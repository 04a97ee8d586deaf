"""Capture points and interventions, against a recomputation in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model import gpt
from gptjax.model.interventions import POINT_MODULES
from gptjax.model.lora import init_adapters, merge_adapters, scale_adapters
from gptjax.training.finetune import split_last_layers
from tests.small_models import make_model

MODEL = make_model(n_layers=3)
CONFIG, T = MODEL.config, MODEL.config.context_length
N, D, H, K, F = 3, CONFIG.d_model, CONFIG.n_heads, CONFIG.head_dim, CONFIG.mlp_dim
TOKEN_BT = jax.random.randint(jax.random.key(2), (2, T), 0, 257)
B = len(TOKEN_BT)
ALL_POINTS = tuple(POINT_MODULES)
SHAPES = {
    "residual": (N, B, T, D),
    "query": (N, B, T, H, K),
    "key": (N, B, T, H, K),
    "value": (N, B, T, H, K),
    "attention": (N, B, H, T, T),
    "head_output": (N, B, T, H, K),
    "mlp_hidden": (N, B, T, F),
    "mlp_output": (N, B, T, D),
}


@functools.partial(jax.jit, static_argnames="capture")
def run(params, token_BT, add=None, adapters=None, capture=ALL_POINTS):
    return gptjax.apply(
        CONFIG, params, token_BT, interventions=add, adapters=adapters, capture=capture
    )


def normalize(x_BTD, norm):
    mean, variance = x_BTD.mean(-1, keepdims=True), x_BTD.var(-1, keepdims=True)
    return (x_BTD - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]


def recompute(params, token_BT, add=None):
    """Logits and activations of every point, in float64 NumPy."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    found = {name: [] for name in ALL_POINTS}

    def point(name, value):
        if add and name in add:
            value = value + np.asarray(add[name], np.float64)[len(found[name])]
        found[name].append(value)
        return value

    x_BTD = p["token_embedding"]["embedding"][np.asarray(token_BT)]
    x_BTD = x_BTD + p["position_embedding"]["embedding"]
    for n in range(N):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        x_BTD = point("residual", x_BTD)
        y_BTD = normalize(x_BTD, block["attention_norm"])
        query_BTHK, key_BSHK, value_BSHK = (
            point(
                name,
                np.einsum("BTD,DHK->BTHK", y_BTD, attention[name]["kernel"])
                + attention[name]["bias"],
            )
            for name in ("query", "key", "value")
        )
        score_BHTS = np.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK) / np.sqrt(K)
        score_BHTS = np.where(np.tri(T, dtype=bool), score_BHTS, -np.inf)
        weight_BHTS = np.exp(score_BHTS - score_BHTS.max(-1, keepdims=True))
        weight_BHTS /= weight_BHTS.sum(-1, keepdims=True)
        weight_BHTS = point("attention", weight_BHTS)
        head_BTHK = np.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK)
        head_BTHK = point("head_output", head_BTHK)
        out = attention["out"]
        x_BTD = x_BTD + np.einsum("BTHK,HKD->BTD", head_BTHK, out["kernel"])
        x_BTD = x_BTD + out["bias"]
        y_BTD = normalize(x_BTD, block["mlp_norm"])
        x_BTF = y_BTD @ mlp["up"]["kernel"] + mlp["up"]["bias"]
        cubic = np.sqrt(2 / np.pi) * (x_BTF + 0.044715 * x_BTF**3)
        x_BTF = point("mlp_hidden", x_BTF * (1 + np.tanh(cubic)) / 2)
        y_BTD = x_BTF @ mlp["down"]["kernel"] + mlp["down"]["bias"]
        x_BTD = x_BTD + point("mlp_output", y_BTD)
    x_BTD = normalize(x_BTD, p["final_norm"])
    logits = x_BTD @ p["token_embedding"]["embedding"].T
    return logits, {name: np.stack(values) for name, values in found.items()}


def assert_recomputed(params, result, add=None):
    logits, activations = result
    expected_logits, expected = recompute(params, TOKEN_BT, add)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-3, atol=2e-4)
    for name, shape in SHAPES.items():
        assert activations[name].shape == shape, name
        np.testing.assert_allclose(
            activations[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name
        )


def noise(name, scale=0.3):
    key = jax.random.key(ALL_POINTS.index(name))
    return scale * jax.random.normal(key, SHAPES[name])


ZEROS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def test_activations_are_those_of_a_recomputation_with_and_without_interventions():
    plain = run(MODEL.params, TOKEN_BT)
    assert_recomputed(MODEL.params, plain)

    for name in ALL_POINTS:
        add = {name: noise(name)}
        result = run(MODEL.params, TOKEN_BT, ZEROS | add)
        assert_recomputed(MODEL.params, result, add)
        assert np.abs(result[0] - plain[0]).max() > 1e-2, name

    logits, captured = run(MODEL.params, TOKEN_BT, capture=("mlp_output",))
    assert set(captured) == {"mlp_output"}
    np.testing.assert_allclose(logits, plain[0], atol=1e-4)
    table, position = MODEL.params["token_embedding"], MODEL.params["position_embedding"]
    np.testing.assert_array_equal(
        plain[1]["residual"][0], table["embedding"][TOKEN_BT] + position["embedding"][None]
    )


def test_interventions_at_all_points_may_be_combined_and_broadcast():
    add = {name: noise(name)[:, :1] for name in ALL_POINTS}

    assert_recomputed(MODEL.params, run(MODEL.params, TOKEN_BT, add), add)


def test_gradients_with_respect_to_interventions_are_finite_differences():
    target = jax.random.normal(jax.random.key(5), (B, T, 257))

    @jax.jit
    def loss(add):
        logits = gptjax.apply(CONFIG, MODEL.params, TOKEN_BT, interventions=add)
        return jnp.vdot(logits, target) / target.size

    grads = jax.grad(loss)(ZEROS)

    for name in ALL_POINTS:
        direction = noise(name, 1.0)
        above, below = (
            np.vdot(recompute(MODEL.params, TOKEN_BT, {name: scale * direction})[0], target)
            for scale in (1e-4, -1e-4)
        )
        difference = (above - below) / 2e-4 / target.size
        slope = jnp.vdot(grads[name], direction)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, difference, rtol=1e-2, atol=1e-5, err_msg=name)


def test_adapters_and_a_tail_of_trainable_layers_have_the_same_points():
    adapters = init_adapters(CONFIG, MODEL.params, "attention/* mlp/*", 2, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    adapters = scale_adapters(adapters, 0.5)
    add = {name: noise(name) for name in ("residual", "value", "mlp_output")}

    adapted = run(MODEL.params, TOKEN_BT, add, adapters)
    split = run(split_last_layers(MODEL.params, 1), TOKEN_BT, add)

    assert_recomputed(merge_adapters(MODEL.params, adapters), adapted, add)
    assert_recomputed(MODEL.params, split, add)


def test_without_capture_the_program_has_no_trace_of_the_points(monkeypatch):
    config = GPTConfig(vocab_size=9, context_length=4, n_layers=2, n_heads=1, d_model=4)
    params = jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0)))

    def program():
        def loss(params):
            return gptjax.apply(config, params, jnp.zeros((1, 4), jnp.int32)).sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    with_points = program()
    monkeypatch.setattr(gpt, "capture_point", lambda module, name, value: value)
    monkeypatch.setattr(gpt, "is_observed", lambda module, name: False)

    assert with_points == program()


@pytest.mark.parametrize(
    ("message", "interventions"),
    [
        ("'atention'.*attention", {"atention": jnp.zeros(3)}),
        (r"\(3, 2, 8, 16\)", {"residual": jnp.zeros((2, 8, 16))}),
        (r"\(2, 2, 8, 16\)", {"residual": jnp.zeros((2, B, T, D))}),
        (r"\(3, 3, 8, 16\)", {"residual": jnp.zeros((3, 3, T, D))}),
    ],
)
def test_unknown_points_and_wrong_shapes_are_rejected(message, interventions):
    with pytest.raises(ConfigError, match=message):
        gptjax.apply(CONFIG, MODEL.params, TOKEN_BT, interventions=interventions)
