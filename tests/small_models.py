"""A small model, every parameter another number, and folders of it to be changed."""

import json

import jax
import numpy as np
import safetensors.numpy

import gptjax
from gptjax.config import GPTConfig
from gptjax.tree import flatten_with_names
from gptjax.weights.model_folder import Model
from tests.model.test_gpt import draw_params


def make_model(**changes):
    shape = {"context_length": 8, "n_layers": 2, "n_heads": 2, "d_model": 16}
    config = GPTConfig(vocab_size=257, **(shape | changes))
    return Model(config, draw_params(config, std=0.2), gptjax.tokenizer.load("bytes"))


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
