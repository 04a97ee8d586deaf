"""Device benchmark: training per attention backend, decode and prefill."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.bench import roofline
from gptjax.config import GPTConfig, MeshConfig, OptimConfig, did_you_mean
from gptjax.data.lm import make_lm_batch
from gptjax.errors import ConfigError
from gptjax.model.attention.dispatch import BACKENDS, resolve_backend
from gptjax.model.gpt import compute_dtype, init
from gptjax.parallel.sharding import make_mesh, shard_batch, shard_tree, use_mesh
from gptjax.runtime.device import package_versions
from gptjax.training import estimate
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step

BATCH_SIZES = (4, 8, 16, 32, 64, 128)  # per device, until out of memory
TIMED_STEPS = 10  # after WARMUP_STEPS
WARMUP_STEPS = 3
TRAIN_LOSS_CHUNK_SIZE = 256  # positions per chunk of logits
DEVICE_BENCHMARKS = ("train", "decode", "prefill")


class TrainRate(NamedTuple):
    """Training throughput and memory of one configuration."""

    attention: str
    rows: int  # per device
    milliseconds: float  # median per step
    tokens_per_s: float  # all devices together
    mfu: float | None  # relative to the published peak; None if unknown
    compile_seconds: float
    program_bytes: int | None  # per device, according to the compiler
    peak_bytes: int | None  # of the process; None if an earlier one was higher


def measure_train_rates(
    config: GPTConfig,
    log: Callable[[str], None],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    backends: Sequence[str] = (),
) -> Iterator[TrainRate]:
    """Measures each supported backend with growing batches until out of memory.

    Args:
        config: model config; its `attention` is replaced.
        log: called with the reason if something cannot be measured.
        batch_sizes: rows per device to try.
        backends: attention backends, or "auto"; all by default.
    """
    for name in backends or BACKENDS:
        if name == "splash" and jax.default_backend() != "tpu" and not backends:
            continue  # runs in slow interpret mode elsewhere
        try:
            backend: Any = resolve_backend(
                name,
                length=config.context_length,
                head_dim=config.head_dim,
                dtype=compute_dtype(config),
            )
        except ConfigError as error:
            log(f"{name:<10} not supported: {error}")
            continue
        for rows in batch_sizes:
            try:
                yield measure_train_rate(dataclasses.replace(config, attention=backend), rows)
            except (ConfigError, jax.errors.JaxRuntimeError) as error:
                log(f"{backend:<10} {rows} rows: {roofline.first_line_of(error)}")
                break


def measure_train_rate(config: GPTConfig, rows: int) -> TrainRate:
    """Times train steps on random tokens, data-parallel over all devices."""
    mesh = make_mesh(MeshConfig())
    devices = jax.device_count()
    optimizer = make_optimizer(OptimConfig(), 1000)
    key = jax.random.key(0)
    params = shard_tree(init(config, key), mesh)
    state = shard_tree(init_state(params, optimizer, key), mesh)
    shape = rows * devices, config.context_length + 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    batch: Any = shard_batch(make_lm_batch(tokens.astype(np.int32), None), mesh, shape[0])
    step = make_train_step(make_lm_loss_fn(config, TRAIN_LOSS_CHUNK_SIZE, False), optimizer)
    previous_peak = roofline.device_peak_bytes()
    started = time.perf_counter()
    with use_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    seconds = []
    for n in range(WARMUP_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        if n >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - started)
    median_seconds = statistics.median(seconds)
    tokens_per_s = shape[0] * config.context_length / median_seconds
    peak_flops = estimate.total_peak_flops()
    mfu = tokens_per_s * estimate.flops_per_token(config) / peak_flops if peak_flops else None
    current_peak = roofline.device_peak_bytes()
    return TrainRate(
        config.attention,
        rows,
        median_seconds * 1e3,
        tokens_per_s,
        mfu,
        compile_seconds,
        program_memory_bytes(compiled),
        # An unchanged peak was reached by an earlier program.
        current_peak if current_peak != previous_peak else None,
    )


def program_memory_bytes(compiled: Any) -> int | None:
    """Device memory of a compiled program, None if the compiler does not report it.

    Sum of arguments, outputs that are not donated arguments, and temporaries.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    new_output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new_output_bytes + memory.temp_size_in_bytes


def format_train_rate(train_rate: TrainRate) -> str:
    """Formats a rate as a line of text."""
    mfu = f", MFU {train_rate.mfu:.1%}" if train_rate.mfu else ""
    memory_texts = [
        f"{estimate.format_bytes(size)} {label}"
        for label, size in (
            ("needed", train_rate.program_bytes),
            ("at peak", train_rate.peak_bytes),
        )
        if size is not None
    ]
    compile_text = f"compiled in {train_rate.compile_seconds:.1f} s"
    return (
        f"{train_rate.attention:<10} {train_rate.rows:>3} rows: "
        f"{train_rate.milliseconds:8.1f} ms/step, {train_rate.tokens_per_s:12,.0f} "
        f"tokens/s{mfu}; {', '.join([compile_text, *memory_texts])}"
    )


def bench_device(
    config: GPTConfig,
    log: Callable[[str], None],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    backends: Sequence[str] = (),
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Benchmarks training, decode and prefill on this device.

    MFU is 6 P + 12 N D T FLOPs per token over the published bfloat16 peak; see
    `gptjax.training.estimate`. `gptjax.bench.roofline` explains the other metrics.

    Args:
        config: model config.
        log: called with each line.
        batch_sizes: training rows per device.
        backends: attention backends; all by default.
        only: any of "train", "decode", "prefill"; all by default.

    Raises:
        ConfigError: an unknown backend or benchmark, or a batch size below 1.
    """
    check_device_options(batch_sizes, backends, only)
    device = jax.devices()[0]
    log(f"device     {jax.device_count()} x {device.device_kind}, {compute_dtype(config)}")
    log(
        f"model      {estimate.parameter_count(config):,} parameters, T = "
        f"{config.context_length}, {estimate.flops_per_token(config) / 1e9:.3f} GFLOPs "
        "per token (6 P + 12 N D T)"
    )
    metrics: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": package_versions(),
        "dtype": str(compute_dtype(config)),
        "context": config.context_length,
    }
    metrics |= roofline.measure_peaks(log)
    if not only or "train" in only:
        metrics |= bench_training(
            config, log, batch_sizes, backends, metrics.get("matmul_bfloat16")
        )
    if not only or "decode" in only:
        metrics |= roofline.bench_decode(config, log, roofline.peak_bandwidth(metrics))
    if not only or "prefill" in only:
        metrics |= roofline.bench_prefill(config, log)
    return metrics


def bench_training(
    config: GPTConfig,
    log: Callable[[str], None],
    batch_sizes: Sequence[int],
    backends: Sequence[str],
    matmul_flops: float | None,
) -> dict[str, Any]:
    """Benchmarks training; `matmul_flops` is the measured FLOP/s of one device."""
    train_rates = []
    for train_rate in measure_train_rates(config, log, batch_sizes, backends):
        log(format_train_rate(train_rate))
        train_rates.append(train_rate)
    if not train_rates:
        log("best       none: no configuration could be trained")
        return {"rates": []}
    best = max(train_rates, key=lambda one: one.tokens_per_s)
    metrics = {
        "rates": [one._asdict() for one in train_rates],
        "train_attention": best.attention,
        "train_rows": best.rows,
        "train_tokens_per_s": best.tokens_per_s,
        "train_mfu": best.mfu,
    }
    matmul_text = ""
    if matmul_flops:
        flops = best.tokens_per_s * estimate.flops_per_token(config)
        metrics["train_share_of_matmul_rate"] = flops / matmul_flops / jax.device_count()
        matmul_text = f", {metrics['train_share_of_matmul_rate']:.1%} of the matmul rate"
    log(f"best       {best.attention} with {best.rows} rows{matmul_text}")
    return metrics


def check_device_options(
    batch_sizes: Sequence[int], backends: Sequence[str], only: Sequence[str]
) -> None:
    """Checks batch sizes, backends and benchmark names.

    Raises:
        ConfigError: see `bench_device`.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(
            f"--rows {','.join(map(str, batch_sizes))} must be numbers of at least 1."
        )
    for name in backends:
        if name not in ("auto", *BACKENDS):
            raise ConfigError(
                f"--attention {name} is not a backend."
                f"{did_you_mean(name, BACKENDS)} Use auto or {', '.join(BACKENDS)}."
            )
    for benchmark in only:
        if benchmark not in DEVICE_BENCHMARKS:
            raise ConfigError(
                f"--only {benchmark} is not available with --device. Use any of "
                f"{', '.join(DEVICE_BENCHMARKS)}, or remove --device."
            )
