"""Benchmark workloads of gptjax.

Each function sets up a workload and returns a function that runs it once. That function
is called repeatedly and returns the number of units processed.
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

from gptjax.config import GPTConfig, OptimConfig
from gptjax.data.datasets import read_python_help
from gptjax.data.lm import make_lm_batch
from gptjax.data.prepare import prepare_dataset
from gptjax.inference.generate import complete
from gptjax.model.gpt import init
from gptjax.model.quantization import fake_quantize
from gptjax.tokenizer import tokenizer
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model, save

WorkFn = Callable[[], int | float]
PROMPT_LENGTH = 16  # prompt tokens before decoding
LOSS_CHUNK_SIZE = 256  # positions per chunk of logits
MATMUL_SIZE = 4096  # rows and columns of each matrix
TEXT_REPEATS = 64  # repetitions of Python's help texts
BANDWIDTH_BYTES = 1 << 30
MODEL_OPTIONS = {"dtype", "attention", "context_length"}


def bench_config(preset: str, **changes: Any) -> GPTConfig:
    """Preset config in float32 without remat, as the peers compute on a CPU."""
    options = {"dtype": "float32", "remat": "none", **changes}
    return GPTConfig.preset(preset, **options)


def accept_preset(make_work: Callable[..., WorkFn]) -> Callable[..., WorkFn]:
    """Wraps a workload to take a preset name, which can be sent to a process.

    Options in MODEL_OPTIONS change the model config.
    """

    @functools.wraps(make_work)
    def make_work_for_preset(preset: str, **options: Any) -> WorkFn:
        changes = {name: options.pop(name) for name in options.keys() & MODEL_OPTIONS}
        return make_work(bench_config(preset, **changes), **options)

    return make_work_for_preset


def random_model(config: GPTConfig) -> Model:
    """Makes a model with random parameters; speed does not depend on them."""
    params = init(config, jax.random.key(0))
    return Model(config, params, tokenizer.load_tokenizer("gpt2"))


def random_tokens(rows: int, length: int, vocab_size: int = 50_257) -> np.ndarray:
    """Random tokens, equal for all sides of a comparison."""
    return np.random.default_rng(0).integers(vocab_size, size=(rows, length))


def make_temp_dir() -> Path:
    """Makes a temporary directory that is deleted when the process exits."""
    temp_dir = tempfile.mkdtemp(prefix="gptjax-bench-")
    atexit.register(shutil.rmtree, temp_dir, ignore_errors=True)
    return Path(temp_dir)


def make_train_work(config: GPTConfig, rows: int, context: int) -> WorkFn:
    """Train steps with AdamW and gradient clipping; units are tokens."""
    optimizer = make_optimizer(OptimConfig(warmup_steps=0, schedule="constant"), 1000)
    key = jax.random.key(0)
    params = init(config, key)
    state = init_state(params, optimizer, key)
    del params
    train_step = jax.jit(
        make_train_step(make_lm_loss_fn(config, LOSS_CHUNK_SIZE, False), optimizer),
        donate_argnums=0,
    )
    tokens = random_tokens(rows, context + 1, config.vocab_size).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, make_lm_batch(tokens, None))

    def work() -> int:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return rows * context

    return work


def make_decode_work(config: GPTConfig, rows: int, new: int, int8: bool = False) -> WorkFn:
    """Greedy decoding after a short prompt; units are new tokens."""
    model = random_model(config)
    if int8:
        params = fake_quantize(model.params)
        model = dataclasses.replace(model, params=params, int8=True)
    prompts = random_tokens(rows, PROMPT_LENGTH, model.config.vocab_size).tolist()
    options: Any = {"temperature": 0.0, "max_new_tokens": new, "stop_ids": ()}

    def work() -> int:
        return sum(len(completion.ids) for completion in complete(model, prompts, **options))

    return work


def make_prefill_work(config: GPTConfig, rows: int, context: int) -> WorkFn:
    """Prefill up to the first new token; units are prompt tokens."""
    model = random_model(config)
    prompts = random_tokens(rows, context, model.config.vocab_size).tolist()

    def work() -> int:
        complete(model, prompts, temperature=0.0, max_new_tokens=1, stop_ids=())
        return rows * context

    return work


def make_load_work(config: GPTConfig) -> WorkFn:
    """Loads a model folder; units are models."""
    model_dir = make_temp_dir() / "model"
    save(random_model(config), model_dir)

    def work() -> int:
        jax.block_until_ready(load(model_dir).params)
        return 1

    return work


def make_matmul_work(size: int = MATMUL_SIZE, dtype: str = "float32", repeats: int = 1) -> WorkFn:
    """Matmul of large square matrices; units are floating-point operations."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    return repeat_program(jax.jit(jnp.matmul), (x, x), repeats, 2 * size**3)


def make_read_work(size_bytes: int = BANDWIDTH_BYTES, repeats: int = 1) -> WorkFn:
    """Sum of an array that exceeds all caches; units are bytes read."""
    return repeat_program(
        jax.jit(jnp.sum), (jnp.ones(size_bytes // 4, jnp.float32),), repeats, size_bytes
    )


def make_copy_work(size_bytes: int = BANDWIDTH_BYTES, repeats: int = 1) -> WorkFn:
    """Copy of an array that exceeds all caches; units are bytes read and written."""
    x = jnp.ones(size_bytes // 4, jnp.float32)
    return repeat_program(jax.jit(lambda x: x + 1), (x,), repeats, 2 * size_bytes)


def repeat_program(program: Any, arrays: tuple[Any, ...], repeats: int, units: int) -> WorkFn:
    """Calls a program several times per synchronization, to hide its cost."""

    def work() -> int:
        result = None
        for _ in range(repeats):  # executed in order, so waiting for the last suffices
            result = program(*arrays)
        jax.block_until_ready(result)
        return repeats * units

    return work


def make_compile_work(config: GPTConfig, rows: int, context: int) -> WorkFn:
    """Traces and compiles a train step without caches; units are programs."""
    optimizer = make_optimizer(OptimConfig(), 1000)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: init_state(init(config, key), optimizer, key))
    tokens = random_tokens(rows, context + 1, config.vocab_size).astype(np.int32)
    batch = make_lm_batch(tokens, None)

    def work() -> int:
        jax.clear_caches()
        train_step = make_train_step(make_lm_loss_fn(config, LOSS_CHUNK_SIZE, False), optimizer)
        jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
        return 1

    return work


def sample_texts() -> list[str]:
    """A few megabytes of text shipped with Python, as documents."""
    return [*read_python_help()] * TEXT_REPEATS


def make_prepare_work(preset: str, workers: int) -> WorkFn:
    """Tokenizes a text file to token files; units are bytes of text."""
    del preset  # all presets use the same tokens
    temp_dir = make_temp_dir()
    source = temp_dir / "text.jsonl"
    source.write_text("".join(json.dumps({"text": x}) + "\n" for x in sample_texts()))
    size_bytes = sum(len(text.encode()) for text in sample_texts())

    def work() -> int:
        shutil.rmtree(temp_dir / "out", ignore_errors=True)
        prepare_dataset([source], "gpt2", temp_dir / "out", workers=workers)
        return size_bytes

    return work


def make_tiktoken_work(preset: str, workers: int) -> WorkFn:
    """Tokenizes the same text in memory with tiktoken's batch method."""
    del preset
    encoding, documents = tokenizer.load_tokenizer("gpt2").encoding, sample_texts()
    size_bytes = sum(len(text.encode()) for text in documents)

    def work() -> int:
        encoding.encode_ordinary_batch(documents, num_threads=workers)
        return size_bytes

    return work


WORKLOADS: dict[str, Callable[..., WorkFn]] = {
    "train": accept_preset(make_train_work),
    "compile": accept_preset(make_compile_work),
    "input": make_prepare_work,
    "tiktoken_input": make_tiktoken_work,
    "decode": accept_preset(make_decode_work),
    "prefill": accept_preset(make_prefill_work),
    "load": accept_preset(make_load_work),
    "matmul": make_matmul_work,
    "bandwidth": make_read_work,
}
