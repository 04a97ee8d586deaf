"""Benchmark suite of `gptjax bench`: rates, ratios to PyTorch, fractions of peak.

A ratio above 1 means that gptjax is faster. Fractions are relative to peaks of this
machine measured in the same minutes.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from gptjax.bench.checkpointing import measure_save_times
from gptjax.bench.roofline import decode_step_bytes
from gptjax.bench.runner import Result, Workload, run_interleaved, run_isolated, summarize_rates
from gptjax.bench.workloads import PROMPT_LENGTH, bench_config
from gptjax.runtime.device import package_versions
from gptjax.training import estimate

TRAIN_CONTEXT = 256  # tokens per training row
DECODE_LENGTH = 128  # tokens generated
PREFILL_LENGTH = 512  # tokens per prompt
SECONDS_UNIT = "s"  # unit of metrics reported as a time, not a rate


class Benchmark(NamedTuple):
    """A benchmark, and the peers that have it too."""

    name: str  # key of WORKLOADS or COMMAND_WORKLOADS
    tag: str  # part of the metric names
    unit: str
    peers: tuple[str, ...]
    options: dict[str, int]


BENCHMARKS = (
    Benchmark("train", "b2", "tokens/s", ("transformers",), {"rows": 2, "context": TRAIN_CONTEXT}),
    Benchmark(
        "train", "b4", "tokens/s", ("transformers", "book"), {"rows": 4, "context": TRAIN_CONTEXT}
    ),
    Benchmark("decode", "b1", "tokens/s", ("transformers",), {"rows": 1, "new": DECODE_LENGTH}),
    Benchmark("decode", "b8", "tokens/s", ("transformers",), {"rows": 8, "new": DECODE_LENGTH}),
    Benchmark(
        "prefill", "b1", "tokens/s", ("transformers",), {"rows": 1, "context": PREFILL_LENGTH}
    ),
    Benchmark("load", "safetensors", "models/s", ("transformers",), {}),
    Benchmark("input", "", "bytes/s", ("tiktoken",), {"workers": os.cpu_count() or 1}),
    Benchmark("import", "", SECONDS_UNIT, (), {}),
    Benchmark("start", "", SECONDS_UNIT, ("transformers",), {}),
    Benchmark("compile", "b4", SECONDS_UNIT, (), {"rows": 4, "context": TRAIN_CONTEXT}),
)


class BenchmarkMetric(NamedTuple):
    """A metric with its name and formatted value."""

    key: str
    value: float
    text: str


def bench_machine(
    log: Callable[[str], None],
    *,
    preset: str = "gpt2",
    peers: bool = False,
    repeats: int = 5,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the benchmarks; returns the metrics with the machine and versions.

    Args:
        log: called with a line per metric.
        preset: model size.
        peers: also time PyTorch, interleaved.
        repeats: timed runs of each side.
        only: benchmarks to run; all by default.

    Raises:
        GptjaxError: a peer is not installed.
    """
    metrics: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": package_versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "preset": preset,
        "repeats": repeats,
    }
    log(f"machine    {metrics['machine']}; XLA_FLAGS={metrics['xla_flags']!r}")
    for metric in run_benchmarks(preset, repeats, peers, only):
        metrics[metric.key] = metric.value
        log(f"{metric.key:<40}{metric.text}")
    return metrics


def run_benchmarks(
    preset: str, repeats: int, peers: bool, only: Sequence[str]
) -> Iterator[BenchmarkMetric]:
    """Yields the metrics of the selected benchmarks as they are measured."""
    for benchmark in BENCHMARKS:
        if not only or benchmark.name in only:
            yield from run_benchmark(benchmark, preset, benchmark.peers if peers else (), repeats)
    if not only or "train" in only:
        yield from measure_train_share(preset, repeats, peers)
    if not only or "decode" in only:
        yield from measure_decode_share(preset, repeats)
        yield from compare_int8_decode(preset, repeats)
    if not only or "save" in only:
        for key, seconds in measure_save_times(bench_config(preset), repeats).items():
            yield range_metric(key, SECONDS_UNIT, summarize_rates(seconds))


def run_benchmark(
    benchmark: Benchmark, preset: str, peers: tuple[str, ...], repeats: int
) -> Iterator[BenchmarkMetric]:
    """Yields rate and memory of a benchmark, alone or against each peer."""
    name, tag, unit, _, options = benchmark
    workload = Workload(name, {"preset": preset, **options})
    if not peers:
        measured = run_isolated(workload, repeats)
        yield rate_metric(metric_key(name, tag), unit, measured)
        yield memory_metric(metric_key(name, tag), measured)
    for peer in peers:
        result = run_interleaved(workload, Workload(f"{peer}_{name}", workload.options), repeats)
        yield from comparison_metrics(name, peer, tag, unit, result)
        yield memory_metric(metric_key(name, tag), result[0])
        yield memory_metric(metric_key(name, peer, tag), result[1])


def comparison_metrics(
    name: str, peer: str, tag: str, unit: str, result: tuple[Result, Result, float]
) -> Iterator[BenchmarkMetric]:
    """Yields the rates of both sides of `run_interleaved`, and their ratio."""
    gptjax_result, peer_result, ratio = result
    yield rate_metric(metric_key(name, tag), unit, gptjax_result)
    yield rate_metric(metric_key(name, peer, tag), unit, peer_result)
    yield plain_metric(metric_key(name, "ratio", peer, tag), ratio)


def metric_key(*parts: str) -> str:
    """Joins the parts of a metric name."""
    return "_".join(part for part in parts if part)


def measure_train_share(preset: str, repeats: int, peers: bool) -> Iterator[BenchmarkMetric]:
    """Measures training at B = 8, and its fraction of the matmul rate.

    Counts 6 FLOPs per token and matmul parameter.
    """
    workload = Workload("train", {"preset": preset, "rows": 8, "context": TRAIN_CONTEXT})
    train_result, matmul_result, share = run_interleaved(workload, Workload("matmul", {}), repeats)
    yield rate_metric("train_b8", "tokens/s", train_result)
    yield rate_metric("matmul", "FLOP/s", matmul_result)
    if peers:
        yield rate_metric(
            "torch_matmul", "FLOP/s", run_isolated(Workload("torch_matmul", {}), repeats)
        )
    config = bench_config(preset)
    flops_per_token = estimate.flops_per_token(config) - estimate.attention_flops(config)
    yield plain_metric("train_share_of_matmul_rate_b8", share * flops_per_token)


def measure_decode_share(preset: str, repeats: int) -> Iterator[BenchmarkMetric]:
    """Measures decoding of one row, as a fraction of the bandwidth limit."""
    workload = Workload("decode", {"preset": preset, "rows": 1, "new": DECODE_LENGTH})
    _, read_result, share = run_interleaved(workload, Workload("bandwidth", {}), repeats)
    yield rate_metric("read", "bytes/s", read_result)
    bytes_per_step = decode_step_bytes(bench_config(preset), 1, PROMPT_LENGTH + DECODE_LENGTH / 2)
    yield plain_metric("decode_share_of_bandwidth_b1", share * bytes_per_step)


def compare_int8_decode(preset: str, repeats: int) -> Iterator[BenchmarkMetric]:
    """Compares decoding with int8 and float32 weights."""
    for rows in (1, 8):
        options = {"preset": preset, "rows": rows, "new": DECODE_LENGTH}
        int8_workload = Workload("decode", {**options, "int8": True})
        int8_result, _, ratio = run_interleaved(int8_workload, Workload("decode", options), repeats)
        yield rate_metric(f"int8_decode_b{rows}", "tokens/s", int8_result)
        yield plain_metric(f"int8_decode_ratio_fp32_b{rows}", ratio)


def rate_metric(key: str, unit: str, measured: Result) -> BenchmarkMetric:
    """Makes a metric of a rate, or of the time per unit, with its range."""
    if unit == SECONDS_UNIT:
        measured = Result(1 / measured.median, 1 / measured.high, 1 / measured.low)
    return range_metric(key, unit, measured)


def range_metric(key: str, unit: str, measured: Result) -> BenchmarkMetric:
    """Makes a metric with unit and range."""
    range_text = f"({measured.low:.4g} to {measured.high:.4g})"
    return BenchmarkMetric(key, measured.median, f"{measured.median:12.4g} {unit} {range_text}")


def memory_metric(key: str, measured: Result) -> BenchmarkMetric:
    """Makes a metric of the peak memory."""
    return BenchmarkMetric(f"{key}_peak_bytes", measured.peak, estimate.format_bytes(measured.peak))


def plain_metric(key: str, value: float) -> BenchmarkMetric:
    """Makes a metric of a ratio or fraction."""
    return BenchmarkMetric(key, value, f"{value:12.3f}")
