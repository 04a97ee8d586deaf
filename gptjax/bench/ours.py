"""What is timed of gptjax: each function prepares a piece of work and returns it.

A piece of work is called again and again, and returns how many units it did.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import tokenizer
from gptjax.config import GPTConfig, OptimConfig
from gptjax.data.batches import pack
from gptjax.generation import complete
from gptjax.loss import next_token_loss
from gptjax.model import init
from gptjax.optim import make_optimizer
from gptjax.train import init_state, make_train_step
from gptjax.weights.folder import Model, save
from gptjax.weights.importing import load

Work = Callable[[], int | float]
PROMPT = 16  # tokens before those that are timed
CHUNK = 256  # positions whose logits exist at a time
SIDE = 4096  # of the square matrices whose product is timed
BANDWIDTH_BYTES = 1 << 30


def config_of(preset: str) -> GPTConfig:
    """A public size in float32, as the others compute it on a CPU."""
    return GPTConfig.preset(preset, dtype="float32")


def model_of(preset: str) -> Model:
    """A public size with random parameters, which are as fast as any."""
    config = config_of(preset)
    params = jax.jit(lambda key: init(config, key))(jax.random.key(0))
    return Model(config, params, tokenizer.load("gpt2"))


def random_tokens(rows: int, length: int, kinds: int = 50_257) -> np.ndarray:
    """The same random tokens for everyone who is timed."""
    return np.random.default_rng(0).integers(kinds, size=(rows, length))


def scratch() -> Path:
    """A folder that is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="gptjax-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def train(preset: str, rows: int, context: int) -> Work:
    """Train steps of AdamW with clipping; units are tokens."""
    config = config_of(preset)
    optimizer = make_optimizer(OptimConfig(warmup_steps=0, schedule="constant"), 1000)
    key = jax.random.key(0)
    params = jax.jit(lambda key: init(config, key))(key)
    state = init_state(params, optimizer, key)
    del params
    step = jax.jit(
        make_train_step(next_token_loss(config, CHUNK, False), optimizer),
        donate_argnums=0,
    )
    token = random_tokens(rows, context + 1, config.vocab_size).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, pack(token, None))

    def work() -> int:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return rows * context

    return work


def decode(preset: str, rows: int, new: int) -> Work:
    """Greedy writing after a short prompt, one token at a time; units are tokens."""
    model = model_of(preset)
    prompts = random_tokens(rows, PROMPT, model.config.vocab_size).tolist()
    options: Any = {"temperature": 0.0, "max_new_tokens": new, "stop_ids": ()}

    def work() -> int:
        return sum(len(one.ids) for one in complete(model, prompts, **options))

    return work


def prefill(preset: str, rows: int, context: int) -> Work:
    """Reading a prompt up to its first new token; units are tokens of the prompt."""
    model = model_of(preset)
    prompts = random_tokens(rows, context, model.config.vocab_size).tolist()

    def work() -> int:
        complete(model, prompts, temperature=0.0, max_new_tokens=1, stop_ids=())
        return rows * context

    return work


def loading(preset: str) -> Work:
    """From a model folder to arrays; units are models."""
    folder = scratch() / "model"
    save(model_of(preset), folder)

    def work() -> int:
        jax.block_until_ready(load(folder).params)
        return 1

    return work


def matmul() -> Work:
    """A product of large square matrices; units are floating-point operations."""
    x = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    product = jax.jit(jnp.matmul)

    def work() -> int:
        product(x, x).block_until_ready()
        return 2 * SIDE**3

    return work


def bandwidth() -> Work:
    """A sum over more numbers than any cache holds; units are bytes."""
    x = jnp.ones(BANDWIDTH_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)

    def work() -> int:
        total(x).block_until_ready()
        return BANDWIDTH_BYTES

    return work


OURS: dict[str, Callable[..., Work]] = {
    "train": train,
    "decode": decode,
    "prefill": prefill,
    "load": loading,
    "matmul": matmul,
    "bandwidth": bandwidth,
}
