"""What is timed of gptjax: each function prepares a piece of work and returns it.

A piece of work is called again and again, and returns how many units it did.
"""

import atexit
import dataclasses
import functools
import json
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
from gptjax.data.named import python_help
from gptjax.data.prepare import prepare
from gptjax.generation import complete
from gptjax.loss import next_token_loss
from gptjax.model import init
from gptjax.optim import make_optimizer
from gptjax.packing import rounded
from gptjax.train import init_state, make_train_step
from gptjax.weights.folder import Model, save
from gptjax.weights.importing import load

Work = Callable[[], int | float]
PROMPT = 16  # tokens before those that are timed
CHUNK = 256  # positions whose logits exist at a time
SIDE = 4096  # of the square matrices whose product is timed
TIMES = 64  # that the text of Python's help is read
BANDWIDTH_BYTES = 1 << 30
MODEL = {"dtype", "attention", "context_length"}


def config_of(preset: str, **changes: Any) -> GPTConfig:
    """A public size as the others compute it on a CPU: in float32, nothing twice."""
    given = {"dtype": "float32", "remat": "none", **changes}
    return GPTConfig.preset(preset, **given)


def by_preset(prepare: Callable[..., Work]) -> Callable[..., Work]:
    """The same for the name of a size: what a process can be told.

    Of its options, those of `MODEL` are the model's.
    """

    @functools.wraps(prepare)
    def prepared(preset: str, **options: Any) -> Work:
        changes = {name: options.pop(name) for name in options.keys() & MODEL}
        return prepare(config_of(preset, **changes), **options)

    return prepared


def model_of(config: GPTConfig) -> Model:
    """A model with random parameters, which are as fast as any."""
    params = init(config, jax.random.key(0))
    return Model(config, params, tokenizer.load("gpt2"))


def random_tokens(rows: int, length: int, kinds: int = 50_257) -> np.ndarray:
    """The same random tokens for everyone who is timed."""
    return np.random.default_rng(0).integers(kinds, size=(rows, length))


def scratch() -> Path:
    """A folder that is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="gptjax-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def train(config: GPTConfig, rows: int, context: int) -> Work:
    """Train steps of AdamW with clipping; units are tokens."""
    optimizer = make_optimizer(OptimConfig(warmup_steps=0, schedule="constant"), 1000)
    key = jax.random.key(0)
    params = init(config, key)
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


def decode(config: GPTConfig, rows: int, new: int, int8: bool = False) -> Work:
    """Greedy writing after a short prompt, one token at a time; units are tokens."""
    model = model_of(config)
    if int8:
        params = rounded(model.params)
        model = dataclasses.replace(model, params=params, int8=True)
    prompts = random_tokens(rows, PROMPT, model.config.vocab_size).tolist()
    options: Any = {"temperature": 0.0, "max_new_tokens": new, "stop_ids": ()}

    def work() -> int:
        return sum(len(one.ids) for one in complete(model, prompts, **options))

    return work


def prefill(config: GPTConfig, rows: int, context: int) -> Work:
    """Reading a prompt up to its first new token; units are tokens of the prompt."""
    model = model_of(config)
    prompts = random_tokens(rows, context, model.config.vocab_size).tolist()

    def work() -> int:
        complete(model, prompts, temperature=0.0, max_new_tokens=1, stop_ids=())
        return rows * context

    return work


def loading(config: GPTConfig) -> Work:
    """From a model folder to arrays; units are models."""
    folder = scratch() / "model"
    save(model_of(config), folder)

    def work() -> int:
        jax.block_until_ready(load(folder).params)
        return 1

    return work


def matmul(side: int = SIDE, dtype: str = "float32", times: int = 1) -> Work:
    """Products of large square matrices; units are floating-point operations."""
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    return repeated(jax.jit(jnp.matmul), (x, x), times, 2 * side**3)


def bandwidth(size: int = BANDWIDTH_BYTES, times: int = 1) -> Work:
    """A sum over more numbers than any cache holds; units are bytes."""
    return repeated(jax.jit(jnp.sum), (jnp.ones(size // 4, jnp.float32),), times, size)


def copying(size: int = BANDWIDTH_BYTES, times: int = 1) -> Work:
    """As many numbers read and written; units are bytes, of both together."""
    x = jnp.ones(size // 4, jnp.float32)
    return repeated(jax.jit(lambda x: x + 1), (x,), times, 2 * size)


def repeated(program: Any, arrays: tuple[Any, ...], times: int, units: int) -> Work:
    """A program started several times before the host waits, as it takes time too."""

    def work() -> int:
        result = None
        for _ in range(times):  # one after the other, so the last one ends last
            result = program(*arrays)
        jax.block_until_ready(result)
        return times * units

    return work


def compiling(config: GPTConfig, rows: int, context: int) -> Work:
    """A train step from Python to a program, never seen before; units are programs."""
    optimizer = make_optimizer(OptimConfig(), 1000)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: init_state(init(config, key), optimizer, key))
    token = random_tokens(rows, context + 1, config.vocab_size).astype(np.int32)
    batch = pack(token, None)

    def work() -> int:
        jax.clear_caches()
        step = make_train_step(next_token_loss(config, CHUNK, False), optimizer)
        jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        return 1

    return work


def texts() -> list[str]:
    """A few megabytes of text that every Python carries, in documents."""
    return [*python_help()] * TIMES


def prepared(preset: str, workers: int) -> Work:
    """Text in a file becomes tokens in files; units are bytes of text."""
    del preset  # all sizes have the same tokens
    folder = scratch()
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts()))
    size = sum(len(text.encode()) for text in texts())

    def work() -> int:
        shutil.rmtree(folder / "out", ignore_errors=True)
        prepare([source], "gpt2", folder / "out", workers=workers)
        return size

    return work


def tiktoken_prepared(preset: str, workers: int) -> Work:
    """The same text as ids in memory, by tiktoken's own batches."""
    del preset
    engine, documents = tokenizer.load("gpt2").engine, texts()
    size = sum(len(text.encode()) for text in documents)

    def work() -> int:
        engine.encode_ordinary_batch(documents, num_threads=workers)
        return size

    return work


OURS: dict[str, Callable[..., Work]] = {
    "train": by_preset(train),
    "compile": by_preset(compiling),
    "input": prepared,
    "tiktoken_input": tiktoken_prepared,
    "decode": by_preset(decode),
    "prefill": by_preset(prefill),
    "load": by_preset(loading),
    "matmul": matmul,
    "bandwidth": bandwidth,
}
