"""The untrained parameters of the book's GPTModel.

Its layers are PyTorch's, so each draws its own when it is made: an Embedding normal
numbers, a Linear uniform ones in [-1/sqrt(inner), 1/sqrt(inner)), for the weight and
then for the bias. Norms draw none.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gptjax.book.torch_random import TorchGenerator
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model import Params, init
from gptjax.tree import named_leaves
from gptjax.weights.names import homes, take, their_shape
from gptjax.weights.streaming import aligned

TABLES = ("tok_emb", "pos_emb")
BLOCK = (  # in the order in which the book's layers make them
    *("att.W_query", "att.W_key", "att.W_value", "att.out_proj"),
    *("ff.layers.0", "ff.layers.2"),
)
NEEDED = {  # of the shapes that the book's class can have
    "tie_embeddings": False,
    "vocab_multiple": 1,
    "n_classes": 0,
    "causal": True,
}


def init_params(config: GPTConfig, seed: int | TorchGenerator = 123) -> Params:
    """What the book's GPTModel holds after `torch.manual_seed(seed)`, as our tree.

    Args:
        config: shape of the model. The book's GPT_CONFIG_124M is GPTConfig.preset(
            "gpt2", tie_embeddings=False, qkv_bias=False, dropout=0.1).
        seed: or a generator, which then stands where PyTorch's does.

    Raises:
        ConfigError: the book's class makes no model of that shape.
    """
    for option, need in NEEDED.items():
        if (value := getattr(config, option)) != need:
            raise ConfigError(
                f"model.{option}={value}, but the book's GPTModel knows only "
                f"{option}={need}. Set it."
            )
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = named_leaves(shapes)
    plan = homes(config, "book", leaves)
    arrays = {name: aligned(leaf.shape) for name, leaf in leaves.items()}
    for name, array in arrays.items():
        array[...] = float(name.endswith("/scale"))
    generator = TorchGenerator(seed) if isinstance(seed, int) else seed
    for name, tensor in drawn(config, plan, generator):
        for leaf, layer, values in take(tensor, plan[name]):
            target = arrays[leaf] if layer is None else arrays[leaf][layer]
            target.reshape(values.shape)[...] = values
    ordered = [jax.device_put(arrays.pop(name)) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def drawn(
    config: GPTConfig, plan: Mapping[str, Any], generator: TorchGenerator
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that are drawn, one at a time, under the book's names."""
    for name in TABLES:
        weight = f"{name}.weight"
        yield weight, generator.normal(their_shape(plan[weight]))
    blocks = [
        f"trf_blocks.{n}.{name}" for n in range(config.n_layers) for name in BLOCK
    ]
    for name in (*blocks, "out_head"):
        shape = their_shape(plan[f"{name}.weight"])
        bound = 1 / math.sqrt(shape[1])
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in plan:
                yield part, generator.uniform(their_shape(plan[part]), -bound, bound)
