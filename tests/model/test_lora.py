"""Adapters and what is trained: fresh ones change nothing, merged ones as much."""

import jax
import jax.numpy as jnp
import numpy as np
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
    split_trainable,
)
from gptjax.tree import flatten_with_names, num_params
from tests.model.test_gpt import draw_params
from tests.small_models import LLAMA

SHAPE = {"context_length": 6, "n_layers": 2, "n_heads": 2, "d_model": 8}
MODEL = SHAPE | {"vocab_size": 33, "n_classes": 2}
CONFIG = GPTConfig(**MODEL)
LLAMA_CONFIG = GPTConfig(**MODEL | LLAMA)
PARAMS = draw_params(CONFIG) | {"head": {"kernel": np.ones((8, 2), np.float32)}}
KEY = jax.random.key(1)
TOKEN_BT = jnp.arange(12).reshape(2, 6)


@jax.jit
def hidden(params, adapters=None):
    config = CONFIG if "position_embedding" in params else LLAMA_CONFIG
    return hidden_states(config, params, TOKEN_BT, adapters=adapters)[0]


@pytest.mark.parametrize("params", [PARAMS, draw_params(LLAMA_CONFIG)])
def test_fresh_adapters_change_nothing_and_merged_ones_are_applied_ones(params):
    fresh = init_adapters(CONFIG, params, "attention/* mlp/*", 4, KEY)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype("f4") / 5, fresh)

    adapters = scale_adapters(moved, 0.5)
    applied = hidden(params, adapters)
    merged = merge_adapters(params, adapters)
    np.testing.assert_allclose(hidden(merged), applied, atol=1e-4)
    assert np.abs(applied - hidden(params)).max() > 1e-2
    np.testing.assert_allclose(hidden(params, fresh), hidden(params), atol=1e-5)
    down, (a_NIR, b_NRO) = "blocks/mlp/down/kernel", moved["blocks"]["mlp"]["down"].values()
    update = flatten_with_names(merged)[down] - flatten_with_names(params)[down]
    np.testing.assert_allclose(update, 0.5 * a_NIR @ b_NRO, atol=1e-5)


def test_only_the_named_layers_have_adapters_bounded_by_their_number_of_inputs():
    adapters = flatten_with_names(init_adapters(CONFIG, PARAMS, "mlp/down attention/q*", 4, KEY))

    assert {name: leaf.shape for name, leaf in adapters.items()} == {
        "blocks/attention/query/lora_a": (2, 8, 4),
        "blocks/attention/query/lora_b": (2, 4, 8),
        "blocks/mlp/down/lora_a": (2, 32, 4),
        "blocks/mlp/down/lora_b": (2, 4, 8),
    }
    for name, leaf in adapters.items():
        most = 0 if name.endswith("b") else leaf.shape[1] ** -0.5
        assert 0.9 * most <= np.abs(leaf).max() <= most
    with pytest.raises(ConfigError, match=r"lora_targets: 'mpl/\*'"):
        init_adapters(CONFIG, PARAMS, "mlp/* mpl/*", 4, KEY)


def test_124m_has_the_published_numbers_of_trainable_parameters():
    """Raschka 2024, appendix E (rank 16, there also on the head) and chapter 6."""
    model = {"vocab_size": 50_257, "n_classes": 2, "head_bias": True}
    c = from_dict(RunConfig, {"model": model, "finetune": {"trainable": "last-block"}})

    def make(key):
        params = gptjax.init(c.model, key)
        adapters = init_adapters(c.model, params, "attention/* mlp/*", 16, key)
        return adapters, split_trainable(c, params, key)[0]

    adapters, last_block = jax.eval_shape(make, jax.random.key(0))

    assert num_params(adapters) == 2_666_528 - 16 * (768 + 2)
    assert num_params(last_block) == 7_090_946


@pytest.mark.parametrize("trainable", TRAINABLE_RULES)
def test_the_two_parts_are_the_whole(trainable):
    c = from_dict(RunConfig, {"model": MODEL, "finetune": {"trainable": trainable}})
    trained, frozen = split_trainable(c, PARAMS, KEY)

    together, adapters = combine_params(c, trained, frozen)

    np.testing.assert_allclose(hidden(together, adapters), hidden(PARAMS), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, merge_last_layers(together), PARAMS)
    assert "head" in trained
    sizes = num_params(trained) + num_params(frozen) - num_params(trained.get("adapters", {}))
    assert sizes == num_params(PARAMS)
