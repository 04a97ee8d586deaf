"""Every form of the model is the same function; `test_causality` has what it hides."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model.gpt import (
    GPT,
    BlockInputs,
    apply_with_cache,
    hidden_states,
    init_cache,
    lm_logits,
    unembedding_matrix,
)
from gptjax.model.layers import Dropout
from gptjax.model.quantization import unstack_layers
from gptjax.training.loss import cross_entropy_sum
from gptjax.tree import flatten_with_names

B, T, V = 2, 8, 50
SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "dtype": "float32"}
TINY = GPTConfig(vocab_size=V, context_length=T, **SHAPE)
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default
TOKEN_BT = jax.random.randint(jax.random.key(1), (B, T), 0, V)
LEAST = np.finfo(np.float32).min


@pytest.fixture(autouse=True)
def _no_silent_casts():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def lively(config, std=0.2):
    """Parameters far from their start, so that attention is not near uniform."""
    shapes = jax.eval_shape(lambda: gptjax.init(config, KEY))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, std, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capture")
def scores(config, params, token_BT, **options):
    return gptjax.apply(config, params, token_BT, **options)


@functools.partial(jax.jit, static_argnums=0)
def continued(config, layers, token_BT, position_BT, cache):
    """Logits of new tokens, and the cache that holds them."""
    x_BTD, cache = apply_with_cache(config, layers, token_BT, position_BT, cache)
    return lm_logits(config, unembedding_matrix(config, layers), x_BTD), cache


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_separate_layers_compute_what_stacked_layers_compute(qkv_bias):
    config = dataclasses.replace(TINY, qkv_bias=qkv_bias)
    params = lively(config)
    query_position_BT = jnp.arange(T)[None].repeat(B, 0)

    @jax.jit
    def both(params, layers):
        x_BTD, _ = hidden_states(config, params, TOKEN_BT)
        y_BTD, _ = GPT(config, stacked=False).apply(
            {"params": layers},
            TOKEN_BT,
            query_position_BT,
            None,
            BlockInputs(query_position_BT, None),
        )
        return x_BTD, y_BTD

    x_BTD, y_BTD = both(params, unstack_layers(params))

    np.testing.assert_allclose(x_BTD, y_BTD, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, T - 1)))
def test_a_row_fed_in_any_pieces_has_the_logits_of_the_whole_row(cuts):
    params = lively(TINY)
    layers, cache = unstack_layers(params), init_cache(TINY, B, T)
    position_BT = jnp.arange(T)[None].repeat(B, 0)
    edges = [0, *sorted(cuts), T]

    pieces = []
    for first, last in itertools.pairwise(edges):
        piece = slice(first, last)
        logit_BTV, cache = continued(TINY, layers, TOKEN_BT[:, piece], position_BT[:, piece], cache)
        pieces.append(logit_BTV)

    whole_BTV = scores(TINY, params, TOKEN_BT)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole_BTV, atol=1e-5)


@pytest.mark.fast
def test_rows_of_one_cache_may_stand_at_different_positions():
    params = lively(TINY)
    layers, cache = unstack_layers(params), init_cache(TINY, B, T)
    lengths = (3, 6)
    padded_BT = TOKEN_BT.at[0, 3:].set(V - 1)  # what must not be seen later

    _, cache = continued(TINY, layers, padded_BT[:, :6], jnp.arange(6)[None].repeat(B, 0), cache)
    for step in range(2):
        place_B = jnp.array(lengths) + step
        token_BT = TOKEN_BT[jnp.arange(B), place_B][:, None]
        logit_BTV, cache = continued(TINY, layers, token_BT, place_B[:, None], cache)
        whole_BTV = scores(TINY, params, TOKEN_BT)
        np.testing.assert_allclose(logit_BTV[:, 0], whole_BTV[jnp.arange(B), place_B], atol=1e-5)


def test_one_row_alone_is_cached_as_it_is_among_others():
    params = lively(TINY)
    layers, position_BT = unstack_layers(params), jnp.arange(T)[None]

    cache, pieces = init_cache(TINY, 1, T), []
    for piece in (slice(0, 4), slice(4, 8)):
        logit_BTV, cache = continued(
            TINY, layers, TOKEN_BT[:1, piece], position_BT[:, piece], cache
        )
        pieces.append(logit_BTV)

    whole_BTV = scores(TINY, params, TOKEN_BT)[:1]
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole_BTV, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_rows_that_pad_the_vocabulary_are_never_predicted(tie_embeddings):
    config = dataclasses.replace(TINY, vocab_multiple=16, tie_embeddings=tie_embeddings)
    params = lively(config)
    name = "token_embedding" if tie_embeddings else "output_embedding"
    table_VD = params[name]["embedding"]
    other = params | {name: {"embedding": table_VD.at[V:].set(1e3)}}

    logit_BTV = scores(config, params, TOKEN_BT)

    assert table_VD.shape[0] == 64
    np.testing.assert_array_equal(logit_BTV[..., V:], LEAST)
    np.testing.assert_array_equal(jax.nn.softmax(logit_BTV)[..., V:], 0)
    np.testing.assert_array_equal(logit_BTV, scores(config, other, TOKEN_BT))


def test_without_a_key_dropout_does_nothing():
    params = lively(TINY)

    dropping = scores(dataclasses.replace(TINY, dropout=0.5), params, TOKEN_BT)

    np.testing.assert_array_equal(dropping, scores(TINY, params, TOKEN_BT))


def test_each_dropout_key_gives_its_own_logits_again_and_again():
    config = dataclasses.replace(TINY, dropout=0.5)
    params = lively(TINY)

    def run(seed):
        return scores(config, params, TOKEN_BT, dropout_key=jax.random.fold_in(KEY, seed))

    np.testing.assert_array_equal(run(0), run(0))
    assert jnp.all(jnp.any(run(0) != run(1), axis=-1))
    assert jnp.all(jnp.any(run(0) != scores(TINY, params, TOKEN_BT), axis=-1))


def test_dropout_keeps_the_mean_of_what_it_is_given():
    x = jnp.ones((100, 1000))

    y = Dropout(0.25).apply({}, x, rngs={"dropout": KEY})

    np.testing.assert_allclose(jnp.unique(y), [0, 1 / 0.75], rtol=1e-6)
    # The mean of 1e5 draws deviates by sqrt(0.25 / 0.75 / 1e5) = 0.0018.
    assert abs(float(y.mean()) - 1) < 0.01


def test_each_call_of_a_dropout_module_drops_others():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dropout = Dropout(0.5)
            return dropout(x), dropout(x)

    one, other = Twice().apply({}, jnp.ones((100, 100)), rngs={"dropout": KEY})

    assert 0.4 < jnp.mean(one == other) < 0.6


def test_every_layer_drops_other_activations():
    config = dataclasses.replace(TINY, dropout=0.5, n_layers=3)
    params = lively(config)
    blocks = jax.tree.map(jnp.zeros_like, params["blocks"])
    blocks["mlp"]["down"]["bias"] += 1  # each layer adds dropout(1) and nothing else

    _, kept = scores(
        config, params | {"blocks": blocks}, TOKEN_BT, dropout_key=KEY, capture=("residual",)
    )

    added_NBTD = jnp.diff(kept["residual"], axis=0)
    kept_NBTD = np.asarray(added_NBTD) > 1
    assert 0.3 < kept_NBTD.mean() < 0.7
    assert 0.3 < np.mean(kept_NBTD[0] == kept_NBTD[1]) < 0.7


@functools.partial(jax.jit, static_argnums=0)
def mean_nats(config, params, token_BT=TOKEN_BT, **options):
    logit_BTV = gptjax.apply(config, params, token_BT, **options)
    target_BT = jnp.roll(token_BT, -1, axis=1)
    nats, weight = cross_entropy_sum(logit_BTV, target_BT, jnp.ones(token_BT.shape))
    return nats / weight


def test_recomputing_saves_memory_and_keeps_the_gradient():
    config = dataclasses.replace(TINY, n_layers=4, dropout=0.5)
    params, token_BT = lively(config), jnp.tile(TOKEN_BT, (16, 1))

    bytes_of, gradient_of = {}, {}
    for remat in ("none", "dots", "full"):
        changed = dataclasses.replace(config, remat=remat)
        nats = functools.partial(mean_nats, changed, dropout_key=KEY)
        compiled = jax.jit(jax.grad(nats)).lower(params, token_BT).compile()
        bytes_of[remat] = compiled.memory_analysis().temp_size_in_bytes
        gradient_of[remat] = compiled(params, token_BT)

    assert bytes_of["full"] < bytes_of["dots"] < bytes_of["none"]
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            gradient_of["none"],
            gradient_of[remat],
        )


def by_hand(config, params, residual_NBTD, weight_NBHTS):
    """What enters each layer from what entered the one before, and the logits.

    In float64 NumPy, from the captured attention weights.
    """
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x_BTD, scale_D, bias_D):
        mean, variance = x_BTD.mean(-1, keepdims=True), x_BTD.var(-1, keepdims=True)
        return (x_BTD - mean) / np.sqrt(variance + 1e-5) * scale_D + bias_D

    def gelu(x):
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    x_BTD = np.asarray(residual_NBTD[0], np.float64)
    entered = []
    for n in range(config.n_layers):
        entered.append(x_BTD)
        block = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
        y_BSD = norm(x_BTD, **suffixed(block["attention_norm"]))
        value = block["attention"]["value"]
        value_BSHK = np.einsum("BSD,DHK->BSHK", y_BSD, value["kernel"]) + value["bias"]
        weight_BHTS = np.asarray(weight_NBHTS[n], np.float64)
        mixed_BTHK = np.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK)
        out = block["attention"]["out"]
        x_BTD = x_BTD + np.einsum("BTHK,HKD->BTD", mixed_BTHK, out["kernel"])
        x_BTD = x_BTD + out["bias"]
        y_BTD = norm(x_BTD, **suffixed(block["mlp_norm"]))
        up, down = block["mlp"]["up"], block["mlp"]["down"]
        y_BTF = gelu(y_BTD @ up["kernel"] + up["bias"])
        x_BTD = x_BTD + y_BTF @ down["kernel"] + down["bias"]
    x_BTD = norm(x_BTD, **suffixed(p["final_norm"]))
    return np.stack(entered), x_BTD @ p["token_embedding"]["embedding"].T


def suffixed(leaves):
    return {f"{name}_D": leaf for name, leaf in leaves.items()}


@pytest.mark.fast
def test_the_logits_follow_from_what_was_captured():
    params = lively(TINY)

    logit_BTV, kept = scores(TINY, params, TOKEN_BT, capture=("residual", "attention"))

    entered_NBTD, expected_BTV = by_hand(TINY, params, kept["residual"], kept["attention"])
    table, position = params["token_embedding"], params["position_embedding"]
    np.testing.assert_array_equal(
        kept["residual"][0], table["embedding"][TOKEN_BT] + position["embedding"][None]
    )
    assert kept["attention"].shape == (TINY.n_layers, B, TINY.n_heads, T, T)
    np.testing.assert_allclose(kept["residual"], entered_NBTD, atol=1e-4)
    np.testing.assert_allclose(logit_BTV, expected_BTV, atol=1e-4)


def test_capturing_changes_nothing_and_gives_what_was_asked_for():
    params = lively(TINY)

    logit_BTV, kept = scores(TINY, params, TOKEN_BT, capture=("attention",))

    assert set(kept) == {"attention"}
    np.testing.assert_allclose(logit_BTV, scores(TINY, params, TOKEN_BT), atol=1e-6)


def test_bfloat16_is_for_activations_only():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = lively(config, std=0.02)

    x_BTD, _ = jax.eval_shape(functools.partial(hidden_states, config), params, TOKEN_BT)
    loss, grads = jax.jit(jax.value_and_grad(functools.partial(mean_nats, config)))(params)

    assert x_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads, loss))} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(mean_nats(TINY, params)), rel=0.01)


@pytest.mark.fast
@pytest.mark.parametrize("vocab_size", [256, 50_257])
def test_an_untrained_model_is_as_good_as_guessing(vocab_size):
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    params = jax.jit(functools.partial(gptjax.init, config))(KEY)
    token_BT = jax.random.randint(KEY, (4, T), 0, vocab_size)

    loss = mean_nats(config, params, token_BT)

    assert float(loss) == pytest.approx(math.log(vocab_size), rel=0.05)


def test_parameters_start_as_gpt2_starts_them():
    config = dataclasses.replace(TINY, n_layers=8, d_model=128)

    leaves = flatten_with_names(jax.jit(functools.partial(gptjax.init, config))(KEY))

    for name, leaf in leaves.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:
            adds_up = name.split("/")[-2] in ("out", "down")
            std = 0.02 / math.sqrt(2 * 8) if adds_up else 0.02
            std = 0.01 if "position" in name else std
            assert float(jnp.std(leaf)) == pytest.approx(std, rel=0.1), name


@pytest.mark.fast
def test_apply_may_be_jitted_mapped_and_differentiated():
    params, token_GBT = lively(TINY), jnp.stack([TOKEN_BT, TOKEN_BT[::-1]])
    apply = functools.partial(gptjax.apply, TINY)

    mapped_GBTV = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(params, token_GBT)
    models = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    losses, grads = jax.vmap(jax.value_and_grad(functools.partial(mean_nats, TINY)))(models)

    np.testing.assert_allclose(mapped_GBTV[1], scores(TINY, params, TOKEN_BT[::-1]), atol=1e-5)
    np.testing.assert_allclose(losses[0], mean_nats(TINY, params), atol=1e-5)
    assert all(jnp.all(jnp.any(g != 0, axis=range(1, g.ndim))) for g in jax.tree.leaves(grads))


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match=r"9 tokens .* model\.context_length=8"):
        gptjax.apply(TINY, lively(TINY), jnp.zeros((1, T + 1), jnp.int32))


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=0"):
        gptjax.init(GPTConfig(), KEY)
