"""Every form of the model is the same function, and it sees only what it may see."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model.gpt import (
    apply_with_cache,
    expected_shapes,
    hidden_states,
    init_cache,
    lm_logits,
    unembedding_matrix,
)
from gptjax.model.quantization import unstack_layers
from gptjax.model.rope import rope_frequencies
from gptjax.training.loss import cross_entropy_sum
from gptjax.tree import flatten_with_names, unflatten_names
from tests.small_models import LLAMA

B, T, V = 2, 8, 50
SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 8, "dtype": "float32"}
TINY = GPTConfig(vocab_size=V, context_length=T, **SHAPE)
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default
TOKEN_BT = jnp.asarray(np.random.default_rng(1).integers(V, size=(B, T)), "int32")
SEGMENT_BT = jnp.array([[3, 3, 3, 1, 1, 2, 2, 2]])


@pytest.fixture(autouse=True)
def _no_silent_casts():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def draw_params(config, std=0.4):
    """Parameters far from their start, so that attention is not near uniform."""
    rng = np.random.default_rng(0)
    return unflatten_names(
        {
            name: jnp.asarray(rng.normal(0, std, shape), "float32")
            for name, shape in expected_shapes(config).items()
        }
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="capture")
def logits(config, params, token_BT, **options):
    return gptjax.apply(config, params, token_BT, **options)


@functools.partial(jax.jit, static_argnums=0)
def extend(config, layers, token_BT, position_BT, cache):
    """Logits of new tokens, and the cache that holds them."""
    x_BTD, cache = apply_with_cache(config, layers, token_BT, position_BT, cache)
    return lm_logits(config, unembedding_matrix(config, layers), x_BTD), cache


@functools.partial(jax.jit, static_argnums=0)
def input_gradients(config, params, segment_id_BT):
    """[T, T, D]: of the loss at each position, by the input of the blocks at each."""
    token_BT, target_B = TOKEN_BT[:1], TOKEN_BT[0, ::-1]

    def nats(input_TD):
        added_NBTD = jnp.zeros((2, 1, T, 8)).at[0, 0].set(input_TD)
        options = {"segment_id_BT": segment_id_BT, "interventions": {"residual": added_NBTD}}
        logit_BTV = gptjax.apply(config, params, token_BT, **options)
        return -jax.nn.log_softmax(logit_BTV[0])[jnp.arange(T), target_B]

    return jax.jacrev(nats)(jnp.zeros((T, 8)))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"remat": "full", "attention": "flash"},
        {"causal": False},
        LLAMA | {"attention": "flash"},
    ],
)
def test_a_loss_has_no_gradient_from_later_inputs_and_other_documents(changes):
    config = dataclasses.replace(TINY, **changes)

    for segment_id_BT in (jnp.zeros_like(SEGMENT_BT), SEGMENT_BT):
        grad_TSD = input_gradients(config, draw_params(config), segment_id_BT)

        used_TS = np.any(np.asarray(grad_TSD) != 0, axis=-1)
        same_TS = np.asarray(segment_id_BT[0, :, None] == segment_id_BT[0, None])
        np.testing.assert_array_equal(used_TS, np.tril(same_TS) if config.causal else same_TS)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, **LLAMA)])
def test_prefixes_and_documents_have_the_logits_that_they_have_alone(config):
    params, half = draw_params(config), T // 2
    whole_BTV = logits(config, params, TOKEN_BT)
    segment_id_BT = jnp.repeat(jnp.array([[0, 1]]), half, axis=1).repeat(B, 0)
    position_BT = jnp.tile(jnp.arange(half), 2)[None].repeat(B, 0)

    packed_BTV = logits(
        config, params, TOKEN_BT, segment_id_BT=segment_id_BT, position_BT=position_BT
    )
    first_BTV, second_BTV = (
        logits(config, params, token_BT) for token_BT in (TOKEN_BT[:, :half], TOKEN_BT[:, half:])
    )

    np.testing.assert_allclose(first_BTV, whole_BTV[:, :half], atol=1e-5)
    np.testing.assert_allclose(first_BTV, packed_BTV[:, :half], atol=1e-5)
    np.testing.assert_allclose(second_BTV, packed_BTV[:, half:], atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("rows", "changes"),
    [(B, {}), (1, {"qkv_bias": False, "tie_embeddings": False}), (B, LLAMA), (1, LLAMA)],
)
def test_rows_of_a_cache_at_different_positions_have_the_logits_of_whole_rows(rows, changes):
    config = dataclasses.replace(TINY, **changes)
    params, lengths = draw_params(config), [6, 3][:rows]  # read at first
    layers, cache = unstack_layers(params), init_cache(config, rows, T)
    position_BT = jnp.arange(T)[None].repeat(rows, 0)
    padded_BT = TOKEN_BT.at[1, 3:].set(V - 1)[:rows]  # must not be seen later
    whole_BTV = logits(config, params, TOKEN_BT[:rows])

    for first in (0, 3):
        piece = slice(first, first + 3)
        found, cache = extend(config, layers, padded_BT[:, piece], position_BT[:, piece], cache)
        for row, length in enumerate(lengths):
            if length > first:
                np.testing.assert_allclose(found[row], whole_BTV[row, piece], atol=1e-5)
    for step in range(2):
        at_B = np.arange(rows), np.array(lengths) + step
        position_B1 = jnp.asarray(at_B[1])[:, None]
        found, cache = extend(config, layers, TOKEN_BT[at_B][:, None], position_B1, cache)
        np.testing.assert_allclose(found[:, 0], whole_BTV[at_B], atol=1e-5)


def test_rope_depends_on_the_distance_of_tokens_and_only_long_waves_are_stretched():
    config = dataclasses.replace(TINY, **LLAMA | {"head_dim": 8, "rope_factor": 1.0})
    position_BT = jnp.arange(T)[None].repeat(B, 0)

    for moved_BT, same in ((position_BT + 100, True), (position_BT * 2, False)):
        found, expected = (
            logits(config, draw_params(config), TOKEN_BT, position_BT=at_BT)
            for at_BT in (moved_BT, position_BT)
        )
        assert np.allclose(found, expected, atol=1e-4) == same

    plain_P = rope_frequencies(config)
    np.testing.assert_allclose(plain_P, 50 ** -np.array([0, 1 / 4, 2 / 4, 3 / 4]), rtol=1e-6)
    # Wavelengths 6, 17, 44 and 118; between 64 / 4 and 64 is a transition.
    config = dataclasses.replace(config, rope_factor=4.0, rope_original_context=64)
    ratio_P = rope_frequencies(config) / plain_P
    np.testing.assert_array_equal(ratio_P[[0, 3]], [1, 0.25])
    assert 0.25 < ratio_P[2] < ratio_P[1] < 1


def test_padding_rows_of_the_vocabulary_are_never_predicted():
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 8)), "float32")
    for name in ("token_embedding", "output_embedding"):
        tied = name == "token_embedding"
        config = dataclasses.replace(TINY, vocab_multiple=16, tie_embeddings=tied)
        params = draw_params(config)

        logit_BTV = lm_logits(config, unembedding_matrix(config, params), x_BTD)

        assert logit_BTV.shape == (B, T, 64)
        np.testing.assert_array_equal(logit_BTV[..., V:], np.finfo(np.float32).min)
        expected_BTV = np.asarray(x_BTD) @ np.asarray(params[name]["embedding"][:V]).T
        np.testing.assert_allclose(logit_BTV[..., :V], expected_BTV, atol=1e-5)


def test_each_dropout_key_layer_and_place_drops_others_and_no_key_none():
    config = dataclasses.replace(TINY, dropout=0.5, n_layers=3)
    params = draw_params(config)
    blocks = jax.tree.map(jnp.zeros_like, params["blocks"])
    blocks["attention"]["value"]["bias"] += 1  # the sum of the weights
    blocks["attention"]["out"]["bias"] += 10  # layers add nothing but
    blocks["mlp"]["down"]["bias"] += 1  # dropout(10) + dropout(1)

    def run(key):
        options = {"dropout_key": key, "capture": ("residual", "head_output")}
        _, kept = logits(config, params | {"blocks": blocks}, TOKEN_BT, **options)
        added_NBTD = np.round(np.diff(kept["residual"], axis=0), 3)
        return added_NBTD, np.asarray(kept["residual"][0]), np.round(kept["head_output"], 3)

    added_NBTD, embedded_BTD, weight_NBTHK = run(KEY)
    plain_NBTD, plain_BTD, plain_NBTHK = run(None)

    assert {*np.unique(plain_NBTD)} == {11}
    assert {*np.unique(added_NBTD)} == {0, 2, 20, 22}
    for pair in ((added_NBTD, run(jax.random.fold_in(KEY, 1))[0]), added_NBTD):
        assert 0.1 < np.mean(pair[0] == pair[1]) < 0.5  # 1/4
    kept_BTD = embedded_BTD != 0
    assert 0.3 < kept_BTD.mean() < 0.7
    np.testing.assert_allclose(embedded_BTD, 2 * plain_BTD * kept_BTD, rtol=1e-6)
    np.testing.assert_array_equal(plain_NBTHK, 1)
    assert 0.7 < weight_NBTHK.mean() < 1.3 < weight_NBTHK.max()


def mean_nats(config, params, token_BT, **options):
    logit_BTV = gptjax.apply(config, params, token_BT, **options)
    target_BT = jnp.roll(token_BT, -1, axis=1)
    nats, weight = cross_entropy_sum(logit_BTV, target_BT, jnp.ones(token_BT.shape))
    return nats / weight


def test_recomputing_keeps_fewer_numbers_for_the_backward_pass():
    kept = {}
    for remat in ("none", "dots", "full"):
        nats = functools.partial(mean_nats, dataclasses.replace(TINY, remat=remat))
        backward = jax.eval_shape(
            lambda params, nats=nats: jax.vjp(nats, params, TOKEN_BT)[1], draw_params(TINY)
        )
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept["full"] < kept["dots"] < kept["none"]


def test_bfloat16_is_for_activations_only():
    config, params = dataclasses.replace(TINY, dtype="bfloat16"), draw_params(TINY, std=0.02)

    x_BTD, _ = jax.eval_shape(functools.partial(hidden_states, config), params, TOKEN_BT)
    nats_and_grads = jax.value_and_grad(functools.partial(mean_nats, config))
    found = jax.eval_shape(nats_and_grads, params, TOKEN_BT)

    assert x_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_parameters_start_as_gpt2_starts_them_and_predict_as_well_as_guessing():
    config = dataclasses.replace(TINY, d_model=64)

    params = gptjax.init(config, KEY)

    for name, leaf in flatten_with_names(params).items():
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, float(name.endswith("scale")))
        else:
            adds_up = name.split("/")[-2] in ("out", "down")
            std = 0.01 if "position" in name else 0.02 / math.sqrt(2 * 2 if adds_up else 1)
            assert float(np.std(leaf)) == pytest.approx(std, rel=0.1), name
    zero = gptjax.init(dataclasses.replace(config, residual_init="zero"), KEY)["blocks"]
    assert not np.any(zero["mlp"]["down"]["kernel"])
    assert np.any(zero["mlp"]["up"]["kernel"])
    nats = jax.jit(functools.partial(mean_nats, config))(params, TOKEN_BT)
    assert float(nats) == pytest.approx(math.log(V), rel=0.05)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=0"):
        gptjax.init(GPTConfig(), KEY)
