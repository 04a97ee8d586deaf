"""Roofline of one device: measured peaks, and decode and prefill against them.

Everything is measured in the same run, on random or computed values: devices may be
faster on zeros.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gptjax.bench import workloads
from gptjax.config import GPTConfig
from gptjax.model.gpt import compute_dtype
from gptjax.training import estimate

NEW_TOKENS = 128  # tokens generated after a prompt of PROMPT_LENGTH
DECODE_BATCH_SIZES = (1, 8, 64)
PREFILL_BATCH_SIZES = (1, 8)
TIMED_RUNS = 5  # the median counts
# Matrix size, array bytes, and calls before the host synchronizes: synchronizing takes
# as long as a small matmul.
CPU_SIZES: tuple[int, int, int] = 1024, 1 << 28, 1
ACCELERATOR_SIZES: tuple[int, int, int] = 8192, 1 << 31, 20


def measure_rate(work: workloads.WorkFn, warmup_runs: int = 1) -> float:
    """Returns the median of the units per second."""
    for _ in range(warmup_runs):
        work()
    unit_rates = []
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        units = work()
        unit_rates.append(units / (time.perf_counter() - started))
    return statistics.median(unit_rates)


def try_measure_rate(
    log: Callable[[str], None], label: str, make_work: Callable[[], workloads.WorkFn]
) -> float | None:
    """Returns the rate; logs the error and returns None if out of memory."""
    try:
        return measure_rate(make_work())
    except jax.errors.JaxRuntimeError as error:
        log(f"{label:<10} {first_line_of(error)}")
        return None


def first_line_of(error: Exception) -> str:
    """Returns the start of an error message; those of XLA can be pages long."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def device_peak_bytes() -> int | None:
    """Peak memory of the first local device, None if it is not tracked."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def measure_peaks(log: Callable[[str], None]) -> dict[str, float]:
    """Measures FLOP/s of bfloat16 matmuls, and bytes/s of reads and copies."""
    matrix_size, array_bytes, repeats = (
        CPU_SIZES if jax.default_backend() == "cpu" else ACCELERATOR_SIZES
    )
    make_works: dict[str, Callable[[], workloads.WorkFn]] = {
        "matmul_bfloat16": lambda: workloads.make_matmul_work(matrix_size, "bfloat16", repeats),
        "read": lambda: workloads.make_read_work(array_bytes, repeats),
        "copy": lambda: workloads.make_copy_work(array_bytes, repeats),
    }
    peaks = {}
    for name, make_work in make_works.items():
        if (rate := try_measure_rate(log, name, make_work)) is not None:
            peaks[name] = rate
    if rate := peaks.get("matmul_bfloat16"):
        log(f"matmul     {rate / 1e12:.3g} TFLOP/s in bfloat16, {matrix_size} x {matrix_size}")
    if rate := peaks.get("read"):
        log(f"memory     {rate / 1e9:,.1f} GB/s reading {estimate.format_bytes(array_bytes)}")
    if rate := peaks.get("copy"):
        log(f"memory     {rate / 1e9:,.1f} GB/s read and written, copying the same")
    return peaks


def peak_bandwidth(peaks: Mapping[str, Any]) -> float | None:
    """Returns the higher of both memory rates, in bytes/s."""
    return max((peaks[n] for n in ("read", "copy") if n in peaks), default=None)


def decode_step_bytes(config: GPTConfig, rows: int, num_filled: int | float) -> float:
    """Minimum bytes read per decode step: E (M + 2 N D S B).

    E is the item size of the compute dtype; M the number of parameters used in matmuls,
    that is, all but the position table (and but the token table if embeddings are not
    tied); S the number of filled cache positions of each of B rows.
    """
    matmul_flops = estimate.flops_per_token(config) - estimate.attention_flops(config)
    num_cache_values = 2 * config.n_layers * config.d_model * num_filled * rows
    return compute_dtype(config).itemsize * (matmul_flops / 6 + num_cache_values)


def bench_decode(
    config: GPTConfig, log: Callable[[str], None], bandwidth: float | None
) -> dict[str, float]:
    """Measures greedy decoding in tokens/s, including a short prefill.

    The fraction of the memory roofline is tokens/s over B x bandwidth /
    `decode_step_bytes`, at the average length of the KV cache.
    """
    num_new_tokens = min(NEW_TOKENS, config.context_length - workloads.PROMPT_LENGTH)
    metrics: dict[str, float] = {}
    if num_new_tokens < 1:
        log(f"decode     skipped: T = {config.context_length} is too short to decode")
        return metrics
    for rows in DECODE_BATCH_SIZES:
        rate = try_measure_rate(
            log,
            "decode",
            lambda rows=rows: workloads.make_decode_work(config, rows, num_new_tokens),
        )
        if rate is None:
            break
        metrics[f"decode_b{rows}"] = rate
        share_text = ""
        if bandwidth:
            bytes_per_step = decode_step_bytes(
                config, rows, workloads.PROMPT_LENGTH + num_new_tokens / 2
            )
            share = rate / rows * bytes_per_step / bandwidth
            metrics[f"decode_share_of_bandwidth_b{rows}"] = share
            share_text = f", {share:.1%} of the bandwidth limit"
        log(f"decode     {rows:>3} rows: {rate:12,.0f} tokens/s{share_text}")
    return metrics


def bench_prefill(config: GPTConfig, log: Callable[[str], None]) -> dict[str, float]:
    """Measures prefill of full-context prompts, in tokens/s to the first token."""
    metrics: dict[str, float] = {}
    length = config.context_length
    for rows in PREFILL_BATCH_SIZES:
        rate = try_measure_rate(
            log, "prefill", lambda rows=rows: workloads.make_prefill_work(config, rows, length)
        )
        if rate is None:
            break
        metrics[f"prefill_b{rows}"] = rate
        log(f"prefill    {rows:>3} rows: {rate:12,.0f} tokens/s")
    return metrics
