"""Benchmark workloads: each function sets one up and returns a function that runs it.

That function returns the number of units processed.
"""

import atexit
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.checkpoint import async_saver
from gptjax.checkpoint.manifest import verify_manifest
from gptjax.config import GPTConfig, MeshConfig, OptimConfig
from gptjax.data.datasets import read_python_help
from gptjax.data.lm import make_lm_batch
from gptjax.data.prepare import prepare_dataset
from gptjax.inference.generate import complete
from gptjax.model.gpt import init
from gptjax.model.quantization import fake_quantize
from gptjax.parallel.sharding import make_mesh, shard_batch, shard_tree
from gptjax.tokenizer import tokenizer
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model, save

WorkFn = Callable[[], int | float]
WARMUP_RUNS = 2
PROMPT_LENGTH = 16  # prompt tokens before decoding
STARTUP_PROMPT = "Every effort moves you"
LOSS_CHUNK_SIZE = 256  # positions per chunk of logits
TEXT_REPEATS = 64  # repetitions of Python's help texts


def measure_rates(work: WorkFn, repeats: int) -> list[float]:
    """Times work after a warm-up; returns the units per second of each run."""
    for _ in range(WARMUP_RUNS):
        work()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        units = work()
        rates.append(units / (time.perf_counter() - started))
    return rates


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


def set_up_training(
    config: GPTConfig, rows: int, context: int, num_devices: int = 1
) -> tuple[Any, Any, Any, Any]:
    """Returns a jitted train step, its state, a batch of random tokens and the mesh."""
    mesh = make_mesh(MeshConfig(data=num_devices))
    optimizer = make_optimizer(OptimConfig(warmup_steps=0, schedule="constant"), 1000)
    key = jax.random.key(0)
    state = shard_tree(init_state(shard_tree(init(config, key), mesh), optimizer, key), mesh)
    tokens = random_tokens(rows, context + 1, config.vocab_size).astype(np.int32)
    batch = shard_batch(make_lm_batch(tokens, None), mesh, rows)
    step = make_train_step(make_lm_loss_fn(config, LOSS_CHUNK_SIZE, False), optimizer)
    return jax.jit(step, donate_argnums=0), state, batch, mesh


def repeat_step(step: Any, state: Any, batch: Any, tokens: int) -> WorkFn:
    """Trains on the same batch; units are tokens."""

    def work() -> int:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return tokens

    return work


def make_train_work(config: GPTConfig, rows: int, context: int) -> WorkFn:
    """Train steps with AdamW and gradient clipping; units are tokens."""
    step, state, batch, _ = set_up_training(config, rows, context)
    return repeat_step(step, state, batch, rows * context)


def make_decode_work(config: GPTConfig, rows: int, new: int, int8: bool = False) -> WorkFn:
    """Greedy decoding after a short prompt; units are new tokens."""
    model = random_model(config)
    if int8:
        model = dataclasses.replace(model, params=fake_quantize(model.params), int8=True)
    prompts = random_tokens(rows, PROMPT_LENGTH, config.vocab_size).tolist()
    options: Any = {"temperature": 0.0, "max_new_tokens": new, "stop_ids": ()}
    return lambda: sum(len(completion.ids) for completion in complete(model, prompts, **options))


def make_prefill_work(config: GPTConfig, rows: int, context: int) -> WorkFn:
    """Prefill up to the first new token; units are prompt tokens."""
    model = random_model(config)
    prompts = random_tokens(rows, context, config.vocab_size).tolist()

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


def make_matmul_work(size: int, dtype: Any, repeats: int) -> WorkFn:
    """Matmul of large square matrices; units are floating-point operations."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return repeat_program(lambda x: x @ x, x, repeats, 2 * size**3)


def make_read_work(size_bytes: int, repeats: int) -> WorkFn:
    """Sum of an array that exceeds all caches; units are bytes read."""
    return repeat_program(jnp.sum, jnp.ones(size_bytes // 4), repeats, size_bytes)


def make_copy_work(size_bytes: int, repeats: int) -> WorkFn:
    """Copy of an array that exceeds all caches; units are bytes read and written."""
    return repeat_program(lambda x: x + 1, jnp.ones(size_bytes // 4), repeats, 2 * size_bytes)


def repeat_program(function: Any, x: jax.Array, repeats: int, units: int) -> WorkFn:
    """Calls a program several times per synchronization, to hide its cost."""
    program = jax.jit(function)

    def work() -> int:
        result = None
        for _ in range(repeats):  # executed in order, so waiting for the last suffices
            result = program(x)
        jax.block_until_ready(result)
        return repeats * units

    return work


def make_prepare_work(workers: int) -> WorkFn:
    """Tokenizes a text file to token files; units are bytes of text."""
    temp_dir, texts = make_temp_dir(), [*read_python_help()] * TEXT_REPEATS
    source = temp_dir / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def work() -> int:
        shutil.rmtree(temp_dir / "out", ignore_errors=True)
        prepare_dataset([source], "gpt2", temp_dir / "out", workers=workers)
        return sum(len(text.encode()) for text in texts)

    return work


def run_python(*arguments: str, **env: str) -> int:
    """Runs Python in a subprocess, without its output; returns 1 unit."""
    command = [sys.executable, *arguments]
    subprocess.run(command, env=os.environ | env, stdout=subprocess.DEVNULL, check=True)
    return 1


def make_import_work() -> WorkFn:
    """Runs `import gptjax` and `gptjax --help`; one unit is both together."""
    return lambda: run_python("-c", "import gptjax") * run_python("-m", "gptjax", "--help")


def make_startup_work(config: GPTConfig) -> WorkFn:
    """Runs `gptjax generate` to the first token, with a warm compilation cache."""
    temp_dir = make_temp_dir()
    save(random_model(config), temp_dir / "model")
    command = ["-m", "gptjax", "generate", str(temp_dir / "model"), STARTUP_PROMPT]
    command += ["--max-new-tokens", "1", "--temperature", "0"]
    return lambda: run_python(*command, GPTJAX_HOME=str(temp_dir))


def time_save(config: GPTConfig) -> dict[str, float]:
    """Times one save of a full training state, in seconds by metric.

    save_blocks_s: until training continues.
    save_copy_s: slowdown of the next step on a CPU, where it cannot reuse the buffers
        of the state that is being saved.
    save_s: until the checkpoint is committed.
    verify_s: verification as before a restore, reading all files.
    """
    _, state, _, _ = set_up_training(config, 1, 1)
    tree = {"params": state.params, "opt_state": state.opt_state}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)

    def time_step(tree: Any) -> tuple[Any, float]:
        started = time.perf_counter()
        tree = jax.block_until_ready(step(tree))
        return tree, time.perf_counter() - started

    tree, _ = time_step(tree)
    tree, step_seconds = time_step(tree)
    temp_dir, seconds, started = make_temp_dir(), {}, time.perf_counter()
    with async_saver(temp_dir, 1) as save_checkpoint:
        save_checkpoint(1, tree)
        seconds["save_blocks_s"] = time.perf_counter() - started
        tree, busy_step_seconds = time_step(tree)
    seconds["save_copy_s"] = busy_step_seconds - step_seconds
    seconds["save_s"] = time.perf_counter() - started
    started = time.perf_counter()
    verify_manifest(temp_dir / "1")
    seconds["verify_s"] = time.perf_counter() - started
    return seconds
