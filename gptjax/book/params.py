"""Initial parameters of the book's GPTModel.

PyTorch initializes each layer on construction: an Embedding from a normal distribution,
a Linear from a uniform one over [-1/sqrt(fan_in), 1/sqrt(fan_in)), first the weight and
then the bias. Layer norms use no random numbers.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gptjax.book.torch_random import TorchGenerator
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model.gpt import init
from gptjax.tree import Params, flatten_with_names
from gptjax.weights.load import aligned_empty
from gptjax.weights.param_map import param_slots, source_shape, unpack_tensor

EMBEDDING_LAYERS = ("tok_emb", "pos_emb")
BLOCK_LAYERS = (  # in the book's construction order
    *("att.W_query", "att.W_key", "att.W_value", "att.out_proj"),
    *("ff.layers.0", "ff.layers.2"),
)
REQUIRED_CONFIG = {  # the configurations that the book's class supports
    "tie_embeddings": False,
    "vocab_multiple": 1,
    "n_classes": 0,
    "causal": True,
    "position": "learned",
    "norm": "layer",
    "norm_eps": 1e-5,
    "mlp": "gelu",
    "mlp_dim": 0,
    "n_kv_heads": 0,
    "head_dim": 0,
    "qk_norm": False,
    "bias": True,
    "residual_init": "gpt2",
}


def init_params(config: GPTConfig, seed: int | TorchGenerator = 123) -> Params:
    """Initializes parameters as the book's GPTModel after `torch.manual_seed(seed)`.

    Args:
        config: the book's GPT_CONFIG_124M is GPTConfig.preset("gpt2",
            tie_embeddings=False, qkv_bias=False, dropout=0.1).
        seed: seed, or a generator, which advances as PyTorch's does.

    Raises:
        ConfigError: the book's class does not support `config`.
    """
    for option, required in REQUIRED_CONFIG.items():
        if (value := getattr(config, option)) != required:
            raise ConfigError(
                f"model.{option}={value} is not supported by the book's GPTModel. Set "
                f"model.{option}={required}."
            )
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = flatten_with_names(shapes)
    slots = param_slots(config, "book", leaves)
    arrays = {name: aligned_empty(leaf.shape) for name, leaf in leaves.items()}
    for name, array in arrays.items():
        array[...] = float(name.endswith("/scale"))
    generator = TorchGenerator(seed) if isinstance(seed, int) else seed
    for name, tensor in sample_params(config, slots, generator):
        for leaf, layer, values in unpack_tensor(tensor, slots[name]):
            target = arrays[leaf] if layer is None else arrays[leaf][layer]
            target.reshape(values.shape)[...] = values
    device_arrays = [jax.device_put(arrays.pop(name)) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), device_arrays)


def sample_params(
    config: GPTConfig, slots: Mapping[str, Any], generator: TorchGenerator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the random tensors by their names in the book."""
    for name in EMBEDDING_LAYERS:
        weight = f"{name}.weight"
        yield weight, generator.normal(source_shape(slots[weight]))
    blocks = [f"trf_blocks.{n}.{name}" for n in range(config.n_layers) for name in BLOCK_LAYERS]
    for name in (*blocks, "out_head"):
        shape = source_shape(slots[f"{name}.weight"])
        bound = 1 / math.sqrt(shape[1])
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in slots:
                yield part, generator.uniform(source_shape(slots[part]), -bound, bound)
