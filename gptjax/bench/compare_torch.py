"""Interleaved comparison of gptjax and PyTorch on one device.

Each side runs in its own process, as do the measurements of gptjax alone: JAX would not
release the memory that PyTorch needs.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.bench import suite, torch_workloads
from gptjax.bench.roofline import NEW_TOKENS
from gptjax.bench.runner import Result, Workload, run_interleaved
from gptjax.bench.workloads import make_temp_dir
from gptjax.errors import ConfigError, GptjaxError

TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # PyTorch's names for JAX's platforms
# Fastest first.
TRANSFORMERS_CACHES = {"cpu": ["dynamic"], "cuda": ["static", "dynamic"]}
COMPARED_BATCH_SIZES = (1, 8)

Comparison = tuple[Result, Result, float]


def bench_against_torch(
    log: Callable[[str], None],
    *,
    preset: str,
    context: int,
    repeats: int,
    device_flags: Sequence[str],
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs `gptjax.bench.device`, then compares with transformers.

    Args:
        log: called with each line.
        preset: model size.
        context: training sequence length T.
        repeats: number of interleaved runs.
        device_flags: further flags of `gptjax bench --device`.
        only: any of "train", "decode", "prefill"; all by default.

    Raises:
        ConfigError: PyTorch is not installed, or does not support the device.
        GptjaxError: the benchmark of gptjax alone failed.
    """
    torch_workloads.import_peer("torch")
    torch_workloads.import_peer("transformers")
    metrics = bench_device_isolated(["--preset", preset, "--context", str(context), *device_flags])
    if metrics["platform"] not in TORCH_DEVICES:
        raise ConfigError(
            f"--peers supports CPUs and NVIDIA GPUs, not {metrics['device']}. Remove --peers."
        )
    device = TORCH_DEVICES[metrics["platform"]]
    if (not only or "train" in only) and "train_rows" in metrics:
        log("compiling on both sides (takes a minute or two) ...")
        metrics |= compare_training(log, preset, context, repeats, device, metrics)
    if not only or "decode" in only:
        for rows in COMPARED_BATCH_SIZES:
            metrics |= compare_decode(log, preset, rows, repeats, device)
    return metrics


def bench_device_isolated(options: Sequence[str]) -> dict[str, Any]:
    """Runs `gptjax bench --device` in a process, which releases its memory."""
    json_path = make_temp_dir() / "device.json"
    command = [sys.executable, "-m", "gptjax", "bench", "--device", *options]
    process = subprocess.run([*command, "--json", str(json_path)])
    if process.returncode:
        raise GptjaxError("gptjax bench --device failed; see its output above.")
    return json.loads(json_path.read_text(encoding="utf-8"))


def compare_training(
    log: Callable[[str], None],
    preset: str,
    context: int,
    repeats: int,
    device: str,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Compares training at gptjax's best batch size, or half of it if that fails."""
    best_rows = metrics["train_rows"]
    for rows in dict.fromkeys((best_rows, max(best_rows // 2, 1))):
        options = {"preset": preset, "rows": rows, "context": context}
        workload = gptjax_workload("train", options, context, attention=metrics["train_attention"])
        peer_workload = Workload("transformers_train", {**options, "device": device})
        if result := try_interleaved(log, workload, peer_workload, repeats):
            compared = log_comparison(log, "train", "device", result)
            return compared | {"train_rows_transformers_device": rows}
    return {}


def compare_decode(
    log: Callable[[str], None], preset: str, rows: int, repeats: int, device: str
) -> dict[str, Any]:
    """Compares greedy decoding with the fastest working cache of transformers."""
    options = {"preset": preset, "rows": rows, "new": NEW_TOKENS}
    for cache in TRANSFORMERS_CACHES[device]:
        peer_options = {"device": device, "cache": cache}
        peer_workload = Workload("transformers_decode", options | peer_options)
        result = try_interleaved(log, gptjax_workload("decode", options), peer_workload, repeats)
        if result:
            compared = log_comparison(log, "decode", f"device_b{rows}", result)
            return compared | {f"decode_cache_transformers_device_b{rows}": cache}
    return {}


def gptjax_workload(
    name: str, options: dict[str, Any], context: int = 1024, **model_options: Any
) -> Workload:
    """Makes a gptjax workload with the default dtype of the device."""
    length = max(context, 1024)
    return Workload(name, {**options, "dtype": "auto", "context_length": length, **model_options})


def try_interleaved(
    log: Callable[[str], None], workload: Workload, peer_workload: Workload, repeats: int
) -> Comparison | None:
    """Returns both results and their ratio, or logs the error and returns None."""
    try:
        return run_interleaved(workload, peer_workload, repeats)
    except GptjaxError as error:
        log(f"{peer_workload.name} with {peer_workload.options}: {error}")
        return None


def log_comparison(
    log: Callable[[str], None], name: str, tag: str, result: Comparison
) -> dict[str, float]:
    """Logs and returns the three metrics of a comparison."""
    metrics = list(suite.comparison_metrics(name, "transformers", tag, "tokens/s", result))
    for metric in metrics:
        log(f"{metric.key:<40}{metric.text}")
    return {metric.key: metric.value for metric in metrics}
