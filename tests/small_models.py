"""A small model, every parameter another number, and folders of it to be changed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import gptjax
from gptjax.config import GPTConfig
from gptjax.tree import flatten_with_names, unflatten_names
from gptjax.weights.model_folder import Model

# Options with other values than GPT-2's, as Llama and Qwen have them.
LLAMA = {"position": "rope", "rope_theta": 50.0, "rope_factor": 4.0, "rope_original_context": 16}
LLAMA |= {"norm": "rms", "norm_eps": 1e-2, "qk_norm": True, "bias": False, "qkv_bias": False}
LLAMA |= {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "mlp": "swiglu", "mlp_dim": 12}


def make_model(std=0.1, tokenizer=None, **changes):
    tokenizer = tokenizer or gptjax.tokenizer.load("bytes")
    shape = {"context_length": 8, "n_layers": 2, "n_heads": 2, "d_model": 16}
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **(shape | changes))
    return Model(config, random_params(config, std), tokenizer)


def random_params(config, std=0.1):
    rng = np.random.default_rng(0)
    shapes = flatten_with_names(jax.eval_shape(lambda: gptjax.init(config, jax.random.key(0))))
    draws = {n: rng.normal(n.endswith("scale"), std, x.shape) for n, x in shapes.items()}
    return unflatten_names({n: jnp.asarray(draw, "float32") for n, draw in draws.items()})


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
