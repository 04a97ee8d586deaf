"""How fast this machine trains, a line for each attention backend, writes and reads."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import budget
from gptjax.attention.choice import BACKENDS, chosen_backend
from gptjax.bench import limits
from gptjax.config import GPTConfig, MeshConfig, OptimConfig, suggestion
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
PARTS = ("train", "decode", "prefill")


class Rate(NamedTuple):
    """How fast one way of training is, and what it takes."""

    attention: str
    rows: int  # on each device
    milliseconds: float  # median of a step
    tokens_per_s: float  # all devices together
    mfu: float | None  # of the published peak, where it is known
    compile_seconds: float
    program_bytes: int | None  # of a device's memory, by the compiler's count
    peak_bytes: int | None  # by the device's own, which knows no peak but the highest


def rates(
    config: GPTConfig,
    say: Callable[[str], None],
    sizes: Sequence[int] = ROWS,
    names: Sequence[str] = (),
) -> Iterator[Rate]:
    """Every backend that can, with ever more rows until the memory is full.

    Args:
        config: shape of the model; its `attention` is replaced.
        say: gets what cannot be measured, and why.
        sizes: rows on each device to try.
        names: of backends, or "auto"; all by default.
    """
    for name in names or BACKENDS:
        if name == "splash" and jax.default_backend() != "tpu" and not names:
            continue  # it would be interpreted
        try:
            chosen: Any = chosen_backend(
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
                yield rate(dataclasses.replace(config, attention=chosen), rows)
            except (ConfigError, jax.errors.JaxRuntimeError) as error:
                say(f"{chosen:<10} {rows} rows: {limits.reason(error)}")
                break


def rate(config: GPTConfig, rows: int) -> Rate:
    """Times train steps on random tokens, one document a row, all devices alike."""
    mesh = make_mesh(MeshConfig())
    devices = jax.device_count()
    optimizer = make_optimizer(OptimConfig(), 1000)
    key = jax.random.key(0)
    params = place(init(config, key), mesh)
    state = place(init_state(params, optimizer, key), mesh)
    shape = rows * devices, config.context_length + 1
    token = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    batch: Any = place_batch(pack(token.astype(np.int32), None), mesh, shape[0])
    step = make_train_step(next_token_loss(config, CHUNK, False), optimizer)
    highest = limits.peak_bytes()
    started = time.perf_counter()
    with on(mesh):
        program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    compiling = time.perf_counter() - started
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
    now = limits.peak_bytes()
    return Rate(
        config.attention,
        rows,
        median * 1e3,
        speed,
        mfu,
        compiling,
        needed_bytes(program),
        now if now != highest else None,  # else that of a program before this one
    )


def needed_bytes(program: Any) -> int | None:
    """What a program needs of a device's memory, where its compiler says it.

    That is its arguments, what it makes unless in their place, and temporaries.
    """
    memory = program.memory_analysis()
    if memory is None:
        return None
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + made + memory.temp_size_in_bytes


def line(one: Rate) -> str:
    """A rate, for people."""
    mfu = f", MFU {one.mfu:.1%}" if one.mfu else ""
    needs = [
        f"{budget.human(size)} {kind}"
        for kind, size in (("needed", one.program_bytes), ("at peak", one.peak_bytes))
        if size is not None
    ]
    compiled = f"compiled in {one.compile_seconds:.1f} s"
    return (
        f"{one.attention:<10} {one.rows:>3} rows: {one.milliseconds:8.1f} ms a step, "
        f"{one.tokens_per_s:12,.0f} tokens/s{mfu}; {', '.join([compiled, *needs])}"
    )


def bench_device(
    config: GPTConfig,
    say: Callable[[str], None],
    sizes: Sequence[int] = ROWS,
    *,
    names: Sequence[str] = (),
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Says a table of `rates`, then what the device writes and reads beside its limits.

    MFU is 6 P + 12 N D T FLOPs a token over the published bfloat16 peak; see
    `gptjax.budget.flops_per_token`. For the other figures see `gptjax.bench.limits`.

    Args:
        config: shape of the model.
        say: gets each line.
        sizes: rows on each device to train with.
        names: of attention's backends; all by default.
        only: of "train", "decode", "prefill"; all by default.

    Raises:
        ConfigError: no backend of that name, no rows, or a part that is not of these.
    """
    check(sizes, names, only)
    device = jax.devices()[0]
    say(
        f"device     {jax.device_count()} x {device.device_kind}, "
        f"{compute_dtype(config)}"
    )
    say(
        f"model      {budget.parameter_count(config):,} parameters, T = "
        f"{config.context_length}, {budget.flops_per_token(config) / 1e9:.3f} GFLOPs a "
        "token (6 P + 12 N D T)"
    )
    found: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": versions(),
        "dtype": str(compute_dtype(config)),
        "context": config.context_length,
    }
    found |= limits.own_rates(say)
    if not only or "train" in only:
        found |= trained(config, say, sizes, names, found.get("matmul_bfloat16"))
    if not only or "decode" in only:
        found |= limits.writing(config, say, limits.bandwidth_of(found))
    if not only or "prefill" in only:
        found |= limits.reading(config, say)
    return found


def trained(
    config: GPTConfig,
    say: Callable[[str], None],
    sizes: Sequence[int],
    names: Sequence[str],
    products: float | None,
) -> dict[str, Any]:
    """The figures of training; `products` are FLOP/s that one device was seen to do."""
    found = []
    for one in rates(config, say, sizes, names):
        say(line(one))
        found.append(one)
    if not found:
        say("best       none: nothing could be trained here")
        return {"rates": []}
    best = max(found, key=lambda one: one.tokens_per_s)
    figures = {
        "rates": [one._asdict() for one in found],
        "train_attention": best.attention,
        "train_rows": best.rows,
        "train_tokens_per_s": best.tokens_per_s,
        "train_mfu": best.mfu,
    }
    share = ""
    if products:
        flops = best.tokens_per_s * budget.flops_per_token(config)
        figures["train_share_of_matmul_rate"] = flops / products / jax.device_count()
        share = f", {figures['train_share_of_matmul_rate']:.1%} of the products above"
    say(f"best       {best.attention} with {best.rows} rows{share}")
    return figures


def check(sizes: Sequence[int], names: Sequence[str], only: Sequence[str]) -> None:
    """Refuses what cannot be measured.

    Raises:
        ConfigError: see `bench_device`.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError(
            f"--rows {' '.join(map(str, sizes))} leaves a step without rows. Give "
            "numbers of 1 or more."
        )
    for name in names:
        if name not in ("auto", *BACKENDS):
            raise ConfigError(
                f"--attention {name}: there is no such backend."
                f"{suggestion(name, BACKENDS)} Choose auto or of {', '.join(BACKENDS)}."
            )
    for part in only:
        if part not in PARTS:
            raise ConfigError(
                f"--only {part} is not measured with --device, as it is no work of the "
                f"device. Choose of {', '.join(PARTS)}, or leave --device."
            )
