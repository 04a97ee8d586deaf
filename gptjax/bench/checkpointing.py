"""Checkpoint benchmark: time that training is blocked, and total save time."""

import time
from pathlib import Path
from typing import Any

import jax

from gptjax.bench.workloads import make_temp_dir
from gptjax.checkpoint.checkpoint import async_saver
from gptjax.checkpoint.manifest import verify_manifest
from gptjax.config import GPTConfig, OptimConfig
from gptjax.model.gpt import init
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state

WARMUP_SAVES = 1  # saves before timing starts


def measure_save_times(config: GPTConfig, repeats: int) -> dict[str, list[float]]:
    """Times saves of a full training state, in seconds by metric.

    save_blocks_s: until training continues.
    save_copy_s: slowdown of the next step on a CPU, where it cannot reuse the buffers
        of the state that is being saved.
    save_s: until the checkpoint is committed.
    verify_s: verification as before a restore, reading all files.
    """
    optimizer = make_optimizer(OptimConfig(), 1000)

    def init_tree(key: Any) -> Any:
        state = init_state(init(config, key), optimizer, key)
        return {"params": state.params, "opt_state": state.opt_state}

    state, temp_dir = jax.jit(init_tree)(jax.random.key(0)), make_temp_dir()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    seconds_by_name: dict[str, list[float]] = {}
    for n in range(WARMUP_SAVES + repeats):
        state, step_seconds = time_step(step, state)
        save_seconds, state = time_save(temp_dir, n, step, state)
        save_seconds["save_copy_s"] -= step_seconds
        for name, seconds in save_seconds.items():
            seconds_by_name.setdefault(name, []).append(seconds)
    return {name: seconds[WARMUP_SAVES:] for name, seconds in seconds_by_name.items()}


def time_step(step: Any, state: Any) -> tuple[Any, float]:
    """Runs a step that reads and writes the whole state; returns it and the seconds."""
    started = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - started


def time_save(temp_dir: Path, n: int, step: Any, state: Any) -> tuple[dict[str, float], Any]:
    """Times one save; also returns the state after the step during the save."""
    save_seconds, started = {}, time.perf_counter()
    with async_saver(temp_dir, 1) as save:
        save(n, state)
        save_seconds["save_blocks_s"] = time.perf_counter() - started
        state, save_seconds["save_copy_s"] = time_step(step, state)
    save_seconds["save_s"] = time.perf_counter() - started
    started = time.perf_counter()
    verify_manifest(temp_dir / str(n))
    save_seconds["verify_s"] = time.perf_counter() - started
    return save_seconds, state
