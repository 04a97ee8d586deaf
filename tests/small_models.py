"""A small model, every parameter another number, and folders of it to be changed."""

import functools
import json

import jax
import numpy as np
import safetensors.numpy

import gptjax
from gptjax.config import GPTConfig
from gptjax.tree import flatten_with_names
from gptjax.weights.model_folder import Model


def make_model(**changes):
    """Every parameter another number, biases and scales too."""
    shape = {"context_length": 8, "n_layers": 2, "n_heads": 2, "d_model": 16}
    config = GPTConfig(vocab_size=257, **(shape | changes))
    return Model(config, drawn(config), gptjax.tokenizer.load("bytes"))


@functools.partial(jax.jit, static_argnums=0)
def drawn(config):
    leaves, tree = jax.tree.flatten(gptjax.init(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def change(folder, edit):
    """Writes the folder's tensors anew after `edit` changed the table of them."""
    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays = edit(arrays) or arrays
    safetensors.numpy.save_file(arrays, path)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(one, other):
    assert one.config == other.config
    assert one.tokenizer.hash == other.tokenizer.hash
    assert flatten_with_names(one.params).keys() == flatten_with_names(other.params).keys()
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
