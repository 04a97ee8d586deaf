"""Adapters and what is trained: fresh ones change nothing, merged ones as much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.config import GPTConfig, RunConfig, build
from gptjax.errors import ConfigError
from gptjax.lora import init_adapters, merged, scaled
from gptjax.model import hidden
from gptjax.optim import decay_mask
from gptjax.trainable import TRAINABLE, join_tail, joined, parted, split_tail
from gptjax.tree import count, named_leaves

SHAPE = {"vocab_size": 33, "context_length": 8, "n_layers": 3, "n_heads": 2}
MODEL = SHAPE | {"d_model": 16, "n_classes": 2}
CONFIG = GPTConfig(**MODEL)
TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    return gptjax.init(CONFIG, jax.random.key(0))


def run_config(trainable, **tune):
    return build(RunConfig, {"model": MODEL, "tune": {"trainable": trainable} | tune})


def hidden_states(params, **options):
    return hidden(CONFIG, params, TOKENS, **options)[0]


def moved(tree, scale=0.1):
    """The tree with noise on every leaf."""
    leaves, shape = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [
        leaf + scale * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(shape, leaves)


@pytest.mark.fast
def test_fresh_adapters_change_nothing(params):
    adapters = init_adapters(CONFIG, params, "attention/* mlp/*", 4, jax.random.key(1))

    np.testing.assert_array_equal(
        hidden_states(params, adapters=adapters), hidden_states(params)
    )


@pytest.mark.fast
@pytest.mark.parametrize("targets", ["attention/* mlp/*", "attention/query", "mlp/up"])
def test_merged_adapters_are_applied_ones(params, targets):
    adapters = init_adapters(CONFIG, params, targets, 4, jax.random.key(1))
    adapters = scaled(moved(adapters), 0.5)

    applied = hidden_states(params, adapters=adapters)

    np.testing.assert_allclose(
        hidden_states(merged(params, adapters)), applied, atol=1e-5
    )
    assert np.abs(applied - hidden_states(params)).max() > 1e-3


def test_scaling_an_adapter_scales_its_product_once(params):
    adapters = moved(init_adapters(CONFIG, params, "mlp/down", 4, jax.random.key(1)))
    kernel = params["blocks"]["mlp"]["down"]["kernel"]

    def added(scale):
        twice = merged(params, scaled(adapters, scale))
        return twice["blocks"]["mlp"]["down"]["kernel"] - kernel

    np.testing.assert_allclose(added(2.0), 2 * added(1.0), atol=1e-5)


def test_adapters_of_124m_have_the_published_number_of_parameters():
    """Raschka 2024, appendix E: rank 16 on all linear layers, and on the head."""
    config = GPTConfig.preset("gpt2")

    def make(key):
        params = gptjax.init(config, key)
        return init_adapters(config, params, "attention/* mlp/*", 16, key)

    adapters = jax.eval_shape(make, jax.random.key(0))

    assert count(adapters) == 2_666_528 - 16 * (768 + 2)


def test_the_last_block_of_124m_has_the_published_number_of_parameters():
    """Raschka 2024, chapter 6: last block, final norm and a head with bias."""
    model = {"vocab_size": 50_257, "n_classes": 2, "head_bias": True}
    c = build(RunConfig, {"model": model, "tune": {"trainable": "last-block"}})

    def make(key):
        return parted(c, gptjax.init(c.model, key), key)[0]

    assert count(jax.eval_shape(make, jax.random.key(0))) == 7_090_946


def test_patterns_that_choose_no_layer_are_refused(params):
    for patterns, message in (
        ("attention/* mpl/*", "'mpl/\\*', which is no layer"),
        ("", "lora_targets is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            init_adapters(CONFIG, params, patterns, 4, jax.random.key(0))


@pytest.mark.fast
@pytest.mark.parametrize("layers", [0, 1, 2, 3, 5])
def test_a_stack_in_two_parts_computes_the_same(params, layers):
    parts = split_tail(params, layers)

    np.testing.assert_array_equal(hidden_states(parts), hidden_states(params))
    jax.tree.map(np.testing.assert_array_equal, join_tail(parts), params)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_two_parts_are_the_whole(params, trainable):
    c = run_config(trainable)
    trained, frozen = parted(c, params, jax.random.key(1))

    together, adapters = joined(c, trained, frozen)

    jax.tree.map(np.testing.assert_array_equal, join_tail(together), params)
    assert (adapters is not None) == (trainable == "lora")
    assert "head" in trained
    sizes = count(trained) + count(frozen) - count(trained.get("adapters", {}))
    assert sizes == count(params)
    assert set(named_leaves(decay_mask(trained))) == set(named_leaves(trained))


def test_frozen_parameters_have_no_optimiser_state(params):
    trained, _ = parted(run_config("head"), params, jax.random.key(1))

    state = optax.adamw(1e-3).init(trained)

    assert count(state) == 2 * count(trained) + 1  # two moments and a count
