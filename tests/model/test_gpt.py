"""Every form of the model is the same function; `test_causality` has what it hides."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, GptjaxError
from gptjax.model.gpt import (
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
def draw_params(config, std=0.2):
    """Parameters far from their start, so that attention is not near uniform."""
    shapes = jax.eval_shape(lambda: gptjax.init(config, KEY))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, std, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capture")
def logits(config, params, token_BT, **options):
    return gptjax.apply(config, params, token_BT, **options)


@functools.partial(jax.jit, static_argnums=0)
def extend(config, layers, token_BT, position_BT, cache):
    """Logits of new tokens, and the cache that holds them."""
    x_BTD, cache = apply_with_cache(config, layers, token_BT, position_BT, cache)
    return lm_logits(config, unembedding_matrix(config, layers), x_BTD), cache


@pytest.mark.fast
@pytest.mark.parametrize(
    ("rows", "changes"), [(B, {}), (1, {"qkv_bias": False, "tie_embeddings": False})]
)
def test_a_row_fed_in_pieces_has_the_logits_of_the_whole_row(rows, changes):
    config = dataclasses.replace(TINY, **changes)
    params, token_BT = draw_params(config), TOKEN_BT[:rows]
    layers, cache = unstack_layers(params), init_cache(config, rows, T)
    position_BT = jnp.arange(T)[None].repeat(rows, 0)

    pieces = []
    for first, last in ((0, 3), (3, 4), (4, 5), (5, 8)):
        piece = slice(first, last)
        logit_BTV, cache = extend(config, layers, token_BT[:, piece], position_BT[:, piece], cache)
        pieces.append(logit_BTV)

    whole_BTV = logits(config, params, token_BT)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole_BTV, atol=1e-5)


@pytest.mark.fast
def test_rows_of_one_cache_may_be_at_different_positions():
    params = draw_params(TINY)
    layers, cache = unstack_layers(params), init_cache(TINY, B, T)
    padded_BT = TOKEN_BT.at[0, 3:].set(V - 1)  # must not be seen later
    position_BT = jnp.arange(T)[None].repeat(B, 0)
    whole_BTV = logits(TINY, params, TOKEN_BT)

    for piece in (slice(0, 3), slice(3, 6)):
        _, cache = extend(TINY, layers, padded_BT[:, piece], position_BT[:, piece], cache)
    for step in range(2):
        place_B = jnp.array((3, 6)) + step  # row 0 continues after its third token
        token_BT = TOKEN_BT[jnp.arange(B), place_B][:, None]
        logit_BTV, cache = extend(TINY, layers, token_BT, place_B[:, None], cache)
        np.testing.assert_allclose(logit_BTV[:, 0], whole_BTV[jnp.arange(B), place_B], atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_padding_rows_of_the_vocabulary_are_never_predicted(tie_embeddings):
    config = dataclasses.replace(TINY, vocab_multiple=16, tie_embeddings=tie_embeddings)
    params = draw_params(config)
    name = "token_embedding" if tie_embeddings else "output_embedding"
    table_VD = params[name]["embedding"]
    other = params | {name: {"embedding": table_VD.at[V:].set(1e3)}}

    logit_BTV = logits(config, params, TOKEN_BT)

    assert table_VD.shape[0] == 64
    np.testing.assert_array_equal(logit_BTV[..., V:], LEAST)
    np.testing.assert_array_equal(jax.nn.softmax(logit_BTV)[..., V:], 0)
    np.testing.assert_array_equal(logit_BTV, logits(config, other, TOKEN_BT))


def test_each_dropout_key_gives_its_own_logits_and_no_key_none():
    config = dataclasses.replace(TINY, dropout=0.5)
    params = draw_params(TINY)

    def run(seed):
        return logits(config, params, TOKEN_BT, dropout_key=jax.random.fold_in(KEY, seed))

    plain_BTV = logits(TINY, params, TOKEN_BT)
    np.testing.assert_array_equal(logits(config, params, TOKEN_BT), plain_BTV)
    np.testing.assert_array_equal(run(0), run(0))
    for other_BTV in (run(1), plain_BTV):
        assert jnp.all(jnp.any(run(0) != other_BTV, axis=-1))


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
    params = draw_params(config)
    blocks = jax.tree.map(jnp.zeros_like, params["blocks"])
    blocks["mlp"]["down"]["bias"] += 1  # each layer adds dropout(1) and nothing else

    _, kept = logits(
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
    config = dataclasses.replace(TINY, dropout=0.5)
    params, token_BT = draw_params(config), jnp.tile(TOKEN_BT, (16, 1))

    sizes, gradients = {}, {}
    for remat in ("none", "dots", "full"):
        changed = dataclasses.replace(config, remat=remat)
        nats = functools.partial(mean_nats, changed, dropout_key=KEY)
        compiled = jax.jit(jax.grad(nats)).lower(params, token_BT).compile()
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
        gradients[remat] = compiled(params, token_BT)

    assert sizes["full"] < sizes["dots"] < sizes["none"]
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            *(gradients["none"], gradients[remat]),
        )


def test_bfloat16_is_for_activations_only():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = draw_params(config, std=0.02)

    x_BTD, _ = jax.eval_shape(functools.partial(hidden_states, config), params, TOKEN_BT)
    loss, grads = jax.jit(jax.value_and_grad(functools.partial(mean_nats, config)))(params)

    assert x_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads, loss))} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(mean_nats(TINY, params)), rel=0.01)


@pytest.mark.fast
def test_an_untrained_model_is_as_good_as_guessing():
    params = gptjax.init(TINY, KEY)

    assert float(mean_nats(TINY, params)) == pytest.approx(math.log(V), rel=0.05)


def test_parameters_start_as_gpt2_starts_them():
    config = dataclasses.replace(TINY, n_layers=8, d_model=128)

    leaves = flatten_with_names(gptjax.init(config, KEY))

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
    params, token_GBT = draw_params(TINY), jnp.stack([TOKEN_BT, TOKEN_BT[::-1]])
    apply = functools.partial(gptjax.apply, TINY)

    mapped_GBTV = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(params, token_GBT)
    models = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    losses, grads = jax.vmap(jax.value_and_grad(functools.partial(mean_nats, TINY)))(models)

    np.testing.assert_allclose(mapped_GBTV[1], logits(TINY, params, TOKEN_BT[::-1]), atol=1e-5)
    np.testing.assert_allclose(losses[0], mean_nats(TINY, params), atol=1e-5)
    assert all(jnp.all(jnp.any(g != 0, axis=range(1, g.ndim))) for g in jax.tree.leaves(grads))


def test_parameters_of_another_config_are_refused():
    wider, params = dataclasses.replace(TINY, d_model=32), draw_params(TINY)

    with pytest.raises(GptjaxError, match=r"token_embedding/embedding .*\(50, 16\).*\(50, 32\)"):
        gptjax.apply(wider, params, TOKEN_BT)
    with pytest.raises(GptjaxError, match=r"final_norm/scale .*missing"):
        gptjax.apply(TINY, {**params, "final_norm": {"bias": jnp.zeros(16)}}, TOKEN_BT)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=0"):
        gptjax.init(GPTConfig(), KEY)
