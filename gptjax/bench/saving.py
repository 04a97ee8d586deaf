"""What a checkpoint costs: how long training waits for it, and all that it takes."""

import time
from pathlib import Path
from typing import Any

import jax

from gptjax import checkpoint
from gptjax.bench.ours import scratch
from gptjax.config import GPTConfig, OptimConfig
from gptjax.manifest import verified
from gptjax.model import init
from gptjax.optim import make_optimizer
from gptjax.train import init_state

WARM = 1  # saves before those that are timed


def save_times(config: GPTConfig, times: int) -> dict[str, list[float]]:
    """Seconds of each of some saves of a whole training state, by what they went into.

    save_blocks_s: until the loop may go on.
    save_copy_s: that the next step takes longer on a CPU, where it may not overwrite
        the state that is being saved.
    save_s: until the step counts.
    verify_s: reading all of it again, as is done before it is restored.
    """
    optimizer = make_optimizer(OptimConfig(), 1000)

    def fresh(key: Any) -> Any:
        state = init_state(init(config, key), optimizer, key)
        return {"params": state.params, "opt_state": state.opt_state}

    state, folder = jax.jit(fresh)(jax.random.key(0)), scratch()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    found: dict[str, list[float]] = {}
    for n in range(WARM + times):
        state, alone = stepped(step, state)
        row, state = one_save(folder, n, step, state)
        row["save_copy_s"] -= alone
        for name, seconds in row.items():
            found.setdefault(name, []).append(seconds)
    return {name: seconds[WARM:] for name, seconds in found.items()}


def stepped(step: Any, state: Any) -> tuple[Any, float]:
    """The state after a step that reads and writes all of it, and its seconds."""
    started = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - started


def one_save(
    folder: Path, n: int, step: Any, state: Any
) -> tuple[dict[str, float], Any]:
    """The times of one save, and the state after a step that came in between."""
    row, started = {}, time.perf_counter()
    with checkpoint.saver(folder, 1) as save:
        save(n, state)
        row["save_blocks_s"] = time.perf_counter() - started
        state, row["save_copy_s"] = stepped(step, state)
    row["save_s"] = time.perf_counter() - started
    started = time.perf_counter()
    verified(folder / str(n))
    row["verify_s"] = time.perf_counter() - started
    return row, state
