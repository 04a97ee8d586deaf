"""How fast this machine trains: one command, a line for each attention backend."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import budget
from gptjax.attention.choice import BACKENDS, chosen_backend
from gptjax.config import GPTConfig, MeshConfig, OptimConfig
from gptjax.data.batches import pack
from gptjax.errors import ConfigError
from gptjax.loss import next_token_loss
from gptjax.model import compute_dtype, init
from gptjax.optim import make_optimizer
from gptjax.run_folder import versions
from gptjax.sharding import make_mesh, on, place, place_batch
from gptjax.train import init_state, make_train_step

ROWS = (4, 8, 16, 32, 64, 128)  # on each device, until they no longer fit
STEPS = 10  # timed, after WARM that are not
WARM = 3
CHUNK = 256  # positions whose logits exist at a time


class Rate(NamedTuple):
    """How fast one way of training is."""

    attention: str
    rows: int  # on each device
    milliseconds: float  # median of a step
    tokens_per_s: float  # all devices together
    mfu: float | None  # of the published peak, where it is known


def rates(
    config: GPTConfig, say: Callable[[str], None], sizes: tuple[int, ...] = ROWS
) -> Iterator[Rate]:
    """Every backend that can, with ever more rows until the memory is full.

    Args:
        config: shape of the model; its `attention` is replaced.
        say: gets what cannot be measured, and why.
        sizes: rows on each device to try.
    """
    for name in BACKENDS:
        if name == "splash" and jax.default_backend() != "tpu":
            continue  # it would be interpreted
        try:
            chosen_backend(
                name,
                length=config.context_length,
                head_width=config.head_width,
                dtype=compute_dtype(config),
            )
        except ConfigError as error:
            say(f"{name:<10} not here: {error}")
            continue
        for rows in sizes:
            try:
                named: Any = {"attention": name}
                yield rate(dataclasses.replace(config, **named), rows)
            except jax.errors.JaxRuntimeError as error:
                say(f"{name:<10} {rows} rows: {str(error).splitlines()[0][:70]}")
                break


def rate(config: GPTConfig, rows: int) -> Rate:
    """Times train steps on random tokens, one document a row, all devices alike."""
    mesh = make_mesh(MeshConfig())
    devices = jax.device_count()
    optimizer = make_optimizer(OptimConfig(), 1000)
    key = jax.random.key(0)
    params = place(jax.jit(lambda key: init(config, key))(key), mesh)
    state = place(init_state(params, optimizer, key), mesh)
    shape = rows * devices, config.context_length + 1
    token = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    batch: Any = place_batch(pack(token.astype(np.int32), None), mesh, shape[0])
    step = make_train_step(next_token_loss(config, CHUNK, False), optimizer)
    with on(mesh):
        program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds = []
    for n in range(WARM + STEPS):
        started = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        if n >= WARM:
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    speed = shape[0] * config.context_length / median
    peak = budget.peak_flops()
    mfu = speed * budget.flops_per_token(config) / peak if peak else None
    return Rate(config.attention, rows, median * 1e3, speed, mfu)


def bench_device(
    config: GPTConfig, say: Callable[[str], None], sizes: tuple[int, ...] = ROWS
) -> dict[str, Any]:
    """Says a table of `rates`, and returns it with the machine it was measured on.

    MFU is 6 P + 12 N D T FLOPs a token over the published bfloat16 peak; see
    `gptjax.budget.flops_per_token`.
    """
    device = jax.devices()[0].device_kind
    say(f"device     {jax.device_count()} x {device}, {compute_dtype(config)}")
    say(
        f"model      {budget.parameter_count(config):,} parameters, T = "
        f"{config.context_length}, {budget.flops_per_token(config) / 1e9:.3f} GFLOPs a "
        "token (6 P + 12 N D T)"
    )
    found = []
    for one in rates(config, say, sizes):
        mfu = f", MFU {one.mfu:.1%}" if one.mfu else ""
        say(
            f"{one.attention:<10} {one.rows:>3} rows: {one.milliseconds:8.1f} ms a "
            f"step, {one.tokens_per_s:12,.0f} tokens/s{mfu}"
        )
        found.append(one)
    best = max(found, key=lambda one: one.tokens_per_s)
    say(f"best       {best.attention} with {best.rows} rows")
    return {
        "device": device,
        "devices": jax.device_count(),
        "versions": versions(),
        "rates": [one._asdict() for one in found],
        "train_tokens_per_s": best.tokens_per_s,
        "train_mfu": best.mfu,
    }
