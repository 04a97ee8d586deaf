"""Adapters and what is trained: fresh ones change nothing, merged ones as much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.config import GPTConfig, RunConfig, from_dict
from gptjax.errors import ConfigError
from gptjax.model.gpt import hidden_states
from gptjax.model.lora import init_adapters, merge_adapters, scale_adapters
from gptjax.training.finetune import (
    TRAINABLE_RULES,
    combine_params,
    merge_last_layers,
    split_last_layers,
    split_trainable,
)
from gptjax.training.optimizer import decay_mask
from gptjax.tree import flatten_with_names, num_params

SHAPE = {"vocab_size": 33, "context_length": 8, "n_layers": 3, "n_heads": 2}
MODEL = SHAPE | {"d_model": 16, "n_classes": 2}
CONFIG = GPTConfig(**MODEL)
KEY = jax.random.key(1)
TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    return gptjax.init(CONFIG, jax.random.key(0))


def run_config(trainable, **tune):
    return from_dict(RunConfig, {"model": MODEL, "finetune": {"trainable": trainable} | tune})


@jax.jit
def hidden(params, adapters=None):
    return hidden_states(CONFIG, params, TOKENS, adapters=adapters)[0]


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
    adapters = init_adapters(CONFIG, params, "attention/* mlp/*", 4, KEY)

    np.testing.assert_array_equal(hidden(params, adapters), hidden(params))


@pytest.mark.fast
@pytest.mark.parametrize("targets", ["attention/* mlp/*", "mlp/down"])
def test_merged_adapters_are_applied_ones(params, targets):
    adapters = scale_adapters(moved(init_adapters(CONFIG, params, targets, 4, KEY)), 0.5)

    applied = hidden(params, adapters)

    np.testing.assert_allclose(hidden(merge_adapters(params, adapters)), applied, atol=1e-5)
    assert np.abs(applied - hidden(params)).max() > 1e-3
    kernel = params["blocks"]["mlp"]["down"]["kernel"]
    added = [
        merge_adapters(params, scale_adapters(adapters, scale))["blocks"]["mlp"]["down"]["kernel"]
        for scale in (1.0, 2.0)
    ]
    np.testing.assert_allclose(added[1] - kernel, 2 * (added[0] - kernel), atol=1e-5)


def test_adapters_of_124m_have_the_published_number_of_parameters():
    """Raschka 2024, appendix E: rank 16 on all linear layers, and on the head."""
    config = GPTConfig.preset("gpt2")

    def make(key):
        params = gptjax.init(config, key)
        return init_adapters(config, params, "attention/* mlp/*", 16, key)

    adapters = jax.eval_shape(make, jax.random.key(0))

    assert num_params(adapters) == 2_666_528 - 16 * (768 + 2)


def test_the_last_block_of_124m_has_the_published_number_of_parameters():
    """Raschka 2024, chapter 6: last block, final norm and a head with bias."""
    model = {"vocab_size": 50_257, "n_classes": 2, "head_bias": True}
    c = from_dict(RunConfig, {"model": model, "finetune": {"trainable": "last-block"}})

    def make(key):
        return split_trainable(c, gptjax.init(c.model, key), key)[0]

    assert num_params(jax.eval_shape(make, jax.random.key(0))) == 7_090_946


@pytest.mark.parametrize(
    ("patterns", "message"),
    [("attention/* mpl/*", r"lora_targets: 'mpl/\*' .* attention/query"), ("", "lora_targets")],
)
def test_patterns_that_choose_no_layer_are_refused(params, patterns, message):
    with pytest.raises(ConfigError, match=message):
        init_adapters(CONFIG, params, patterns, 4, jax.random.key(0))


@pytest.mark.fast
@pytest.mark.parametrize("layers", [0, 1, 5])
def test_a_stack_in_two_parts_computes_the_same(params, layers):
    parts = split_last_layers(params, layers)

    np.testing.assert_allclose(hidden(parts), hidden(params), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, merge_last_layers(parts), params)


@pytest.mark.parametrize("trainable", TRAINABLE_RULES)
def test_the_two_parts_are_the_whole(params, trainable):
    c = run_config(trainable)
    trained, frozen = split_trainable(c, params, jax.random.key(1))

    together, adapters = combine_params(c, trained, frozen)

    jax.tree.map(np.testing.assert_array_equal, merge_last_layers(together), params)
    assert (adapters is not None) == (trainable == "lora")
    assert "head" in trained
    sizes = num_params(trained) + num_params(frozen) - num_params(trained.get("adapters", {}))
    assert sizes == num_params(params)
    assert set(flatten_with_names(decay_mask(trained))) == set(flatten_with_names(trained))


def test_frozen_parameters_have_no_optimiser_state(params):
    trained, _ = split_trainable(run_config("head"), params, jax.random.key(1))

    state = optax.adamw(1e-3).init(trained)

    assert num_params(state) == 2 * num_params(trained) + 1  # two moments and a count
