"""Benchmark suite of `gptjax bench`: rates and times, and fractions of measured peaks.

The peaks are measured in the same run, on random or computed values: devices may be
faster on zeros.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from gptjax.bench import workloads
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, short_message
from gptjax.model.attention.dispatch import BACKENDS
from gptjax.model.gpt import compute_dtype, resolve_backend
from gptjax.parallel.sharding import use_mesh
from gptjax.runtime.device import package_versions
from gptjax.runtime.terminal import logger
from gptjax.training import estimate

NEW_TOKENS = 128  # tokens generated after a prompt of PROMPT_LENGTH
# Matrix size, array bytes, and calls before the host synchronizes: synchronizing takes
# as long as a small matmul.
CPU_SIZES: tuple[int, int, int] = 4096, 1 << 30, 1
ACCELERATOR_SIZES: tuple[int, int, int] = 8192, 1 << 31, 20

DEVICE_PARTS = ("train", "decode", "prefill")  # of `gptjax bench --device`


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measured model and batch sizes; the defaults are for a host and its CPU."""

    config: GPTConfig
    repeats: int  # timed runs
    context: int = 256  # tokens per training row
    train_batch_sizes: Sequence[int] = (2, 4, 8)  # per device, tried until out of memory
    backends: Sequence[Any] = ("auto",)  # attention backends in training
    decode_batch_sizes: Sequence[int] = (1, 8)
    prefill_batch_sizes: Sequence[int] = (1,)
    prefill_length: int = 512


def make_machine_options(preset: str, repeats: int) -> BenchOptions:
    """Makes the options for a host and its CPU, in float32."""
    config = GPTConfig.preset(preset, dtype="float32", remat="none")
    return BenchOptions(config=config, repeats=repeats)


def make_device_options(preset: str, repeats: int) -> BenchOptions:
    """Makes the options for an accelerator, in its default dtype."""
    on_tpu = jax.default_backend() == "tpu"
    return BenchOptions(
        config=GPTConfig.preset(preset, remat="none"),
        repeats=repeats,
        context=1024,
        train_batch_sizes=(4, 8, 16, 32, 64, 128),
        backends=[name for name in BACKENDS if name != "splash" or on_tpu],  # slow elsewhere
        decode_batch_sizes=(1, 8, 64),
        prefill_batch_sizes=(1, 8),
        prefill_length=1024,
    )


def run_benchmarks(options: BenchOptions, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Runs some of the benchmarks; yields the metrics so far, first the machine's."""
    config, device = options.config, jax.devices()[0]
    metrics: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": package_versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "dtype": str(compute_dtype(config)),
        "context": options.context,
        "repeats": options.repeats,
    }
    logger.info(f"{metrics['devices']} x {metrics['device']}, {metrics['machine']}")
    logger.info(
        f"{estimate.parameter_count(config):,} parameters, {metrics['dtype']}, "
        f"T = {options.context}, XLA_FLAGS={metrics['xla_flags']!r}"
    )
    yield metrics
    if {"train", "decode"} & set(only):
        only = ["peaks", *only]
    for part, name, unit, make_work in list_workloads(options):
        if part in only and (rate := try_measure(options, name, unit, make_work)):
            metrics[name] = rate
            yield metrics
    if "decode" in only:
        metrics |= compare_decode(options, metrics)
        yield metrics
    if "train" in only:
        metrics |= bench_training(options, metrics.get("matmul"))
        yield metrics
    if "save" in only:
        yield metrics | bench_saves(options)


def list_workloads(options: BenchOptions) -> list[tuple[str, str, str, Any]]:
    """Lists part, metric, unit and workload of everything but training and saving."""
    config, on_cpu = options.config, jax.default_backend() == "cpu"
    size, array_bytes, repeats = CPU_SIZES if on_cpu else ACCELERATOR_SIZES
    make_matmul_work = partial(workloads.make_matmul_work, size, compute_dtype(config), repeats)
    rows = [
        ("peaks", "matmul", "FLOP/s", make_matmul_work),
        ("peaks", "read", "bytes/s", partial(workloads.make_read_work, array_bytes, repeats)),
        ("peaks", "copy", "bytes/s", partial(workloads.make_copy_work, array_bytes, repeats)),
        ("load", "load_safetensors", "models/s", partial(workloads.make_load_work, config)),
        ("input", "input", "bytes/s", partial(workloads.make_prepare_work, os.cpu_count() or 1)),
        ("import", "import", "s", workloads.make_import_work),
        ("start", "start", "s", partial(workloads.make_startup_work, config)),
    ]
    for batch in options.decode_batch_sizes:
        make_work = partial(workloads.make_decode_work, config, batch, NEW_TOKENS)
        rows.append(("decode", f"decode_b{batch}", "tokens/s", make_work))
        if config.dtype == "float32":
            make_int8_work = partial(make_work, int8=True)
            rows.append(("decode", f"int8_decode_b{batch}", "tokens/s", make_int8_work))
    for batch in options.prefill_batch_sizes:
        make_work = partial(workloads.make_prefill_work, config, batch, options.prefill_length)
        rows.append(("prefill", f"prefill_b{batch}", "tokens/s", make_work))
    return rows


def try_measure(
    options: BenchOptions, name: str, unit: str, make_work: Callable[[], workloads.WorkFn]
) -> float | None:
    """Logs and returns the median of the rate; None if out of memory.

    In the unit s, the seconds per unit of work take the place of the rate.
    """
    try:
        rates = workloads.measure_rates(make_work(), options.repeats)
    except jax.errors.JaxRuntimeError as error:
        logger.info(f"{name:<34}{short_message(error)}")
        return None
    values = [1 / rate for rate in rates] if unit == "s" else rates
    median = statistics.median(values)
    logger.info(f"{name:<34}{median:12.4g} {unit} ({min(values):.4g} to {max(values):.4g})")
    return median


def compare_decode(options: BenchOptions, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Compares decoding with the memory roofline, and int8 with float32 weights.

    The fraction of the roofline is tokens/s over B x bandwidth / `decode_step_bytes`,
    at the average length of the KV cache; the bandwidth is the higher of both rates.
    """
    compared = {}
    bandwidth = max(metrics.get("read", 0.0), metrics.get("copy", 0.0))
    num_filled = workloads.PROMPT_LENGTH + NEW_TOKENS / 2
    for rows in options.decode_batch_sizes:
        rate, int8_rate = (metrics.get(f"{prefix}decode_b{rows}") for prefix in ("", "int8_"))
        if rate and bandwidth:
            step_bytes = decode_step_bytes(options.config, rows, num_filled)
            share = rate / rows * step_bytes / bandwidth
            compared[f"decode_share_of_bandwidth_b{rows}"] = share
            logger.info(f"decode, {rows} rows: {share:.1%} of the bandwidth limit")
        if rate and int8_rate:
            compared[f"int8_decode_ratio_fp32_b{rows}"] = int8_rate / rate
    return compared


def decode_step_bytes(config: GPTConfig, rows: int, num_filled: int | float) -> float:
    """Minimum bytes read per decode step: E (M + 2 N G K S B).

    E is the item size of the compute dtype; M the number of parameters used in matmuls,
    that is, all but the position table (and but the token table if embeddings are not
    tied); S the number of filled cache positions of each of B rows.
    """
    matmul_flops = estimate.flops_per_token(config) - estimate.attention_flops(config)
    features = config.actual_kv_heads * config.actual_head_dim
    num_cache_values = 2 * config.n_layers * features * num_filled * rows
    return compute_dtype(config).itemsize * (matmul_flops / 6 + num_cache_values)


def bench_training(options: BenchOptions, matmul_rate: float | None) -> dict[str, Any]:
    """Measures each supported backend with growing batches until out of memory.

    The fraction of the matmul rate counts all FLOPs of `estimate.flops_per_token`.
    """
    rates: list[dict[str, Any]] = []
    config = dataclasses.replace(options.config, context_length=options.context)
    for name in options.backends:
        try:
            backend: Any = resolve_backend(dataclasses.replace(config, attention=name))
        except ConfigError as error:
            logger.info(f"train {name}: {error}")
            continue
        for rows in options.train_batch_sizes:
            attention_config = dataclasses.replace(config, attention=backend)
            try:
                rate = measure_train_rate(attention_config, rows, options.repeats)
            except (ConfigError, jax.errors.JaxRuntimeError) as error:
                logger.info(f"train {backend}, {rows} rows: {short_message(error)}")
                break
            logger.info(format_train_rate(rate))
            rates.append(rate)
    metrics: dict[str, Any] = {"rates": rates}
    flops_per_token = estimate.flops_per_token(config) / jax.device_count()
    for rate in sorted(rates, key=lambda rate: rate["tokens_per_s"]):  # the best one is last
        for name in ("attention", "rows", "tokens_per_s", "mfu"):
            metrics[f"train_{name}"] = rate[name]
        metrics[f"train_b{rate['rows']}"] = rate["tokens_per_s"]
        metrics[f"compile_b{rate['rows']}"] = rate["compile_seconds"]
        if matmul_rate:
            share = rate["tokens_per_s"] * flops_per_token / matmul_rate
            metrics["train_share_of_matmul_rate"] = share
            metrics[f"train_share_of_matmul_rate_b{rate['rows']}"] = share
            logger.info(f"train {rate['attention']}, {rate['rows']} rows: {share:.1%} of matmul")
    return metrics


def measure_train_rate(config: GPTConfig, rows: int, repeats: int) -> dict[str, Any]:
    """Times train steps on random tokens, data-parallel over all devices."""
    devices = jax.device_count()
    tokens = rows * devices * config.context_length
    step, state, batch, mesh = workloads.set_up_training(
        config, rows * devices, config.context_length, devices
    )
    started = time.perf_counter()
    with use_mesh(mesh):
        compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    work = workloads.repeat_step(compiled, state, batch, tokens)
    tokens_per_s = statistics.median(workloads.measure_rates(work, repeats))
    peak_flops, memory = estimate.total_peak_flops(), compiled.memory_analysis()
    return {
        "attention": config.attention,
        "rows": rows,  # per device
        "milliseconds": 1e3 * tokens / tokens_per_s,  # per step
        "tokens_per_s": tokens_per_s,  # all devices together
        # 6 P + 12 N D T FLOPs per token over the published bfloat16 peak, if known
        "mfu": tokens_per_s * estimate.flops_per_token(config) / peak_flops if peak_flops else None,
        "compile_seconds": compile_seconds,
        # per device; donated arguments are among the outputs
        "program_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }


def format_train_rate(rate: Mapping[str, Any]) -> str:
    """Formats a rate as a line of text."""
    mfu = f", MFU {rate['mfu']:.1%}" if rate["mfu"] else ""
    return (
        f"train {rate['attention']:<10} {rate['rows']:>3} rows  "
        f"{rate['milliseconds']:8.1f} ms/step, {rate['tokens_per_s']:,.0f} tokens/s{mfu}; "
        f"compiled in {rate['compile_seconds']:.1f} s, "
        f"{estimate.format_bytes(rate['program_bytes'])} needed"
    )


def bench_saves(options: BenchOptions) -> dict[str, float]:
    """Measures checkpoints; see `workloads.time_save`."""
    saves = [workloads.time_save(options.config) for _ in range(1 + options.repeats)][1:]
    medians = {name: statistics.median(save[name] for save in saves) for name in saves[0]}
    for name, seconds in medians.items():
        logger.info(f"{name:<34}{seconds:12.4g} s")
    return medians
