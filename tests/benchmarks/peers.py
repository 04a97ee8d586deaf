"""Compares gptjax with transformers and the book's code on this machine.

    pip install -e ".[peers]" && pip install --no-deps llms-from-scratch
    python -m tests.benchmarks.peers [--only PART] [--repeats N] [--json FILE]

Each side runs in a process of its own, since JAX would not release the memory that
PyTorch needs. Both run one at a time, in turns, so that a machine that slows down
affects both; the ratio is the median over adjacent pairs.

A ratio above 1 means that gptjax is faster. On an NVIDIA GPU, training and decoding are
compared, training with the attention backend and batch size that `gptjax bench
--device` finds best. Each result is printed and stored as it arrives. Exits with 1 if a
comparison failed, and with 2 if the machine does not meet the requirements.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from gptjax.cli.session import log_to_console
from gptjax.config import GPTConfig
from gptjax.runtime import cpu_flags

PARTS = ("train", "decode", "prefill", "load", "input", "start")
NEW_TOKENS = 128  # per row
WARMUP_RUNS = 2  # runs before timing starts
_work = []  # of a worker process


def new_process():
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def in_new_process(function, *args):
    """Calls a function of a module in a new process and returns its result."""
    with new_process() as pool:
        return pool.submit(function, *args).result()


def _set_up(make_work):
    function = make_work.func if isinstance(make_work, partial) else make_work
    is_fast = cpu_flags.FAST_CPU_XLA_FLAGS[-1] in os.environ.get("XLA_FLAGS", "")
    if function.__module__.startswith("gptjax.") and is_fast:
        cpu_flags.disable_malloc_trim()  # not for peers
    _work.append(make_work())
    for _ in range(WARMUP_RUNS):
        _work[0]()


def _time_once():
    _work[0]()  # after a wait caches are cold and pages reclaimed
    started = time.perf_counter()
    units = _work[0]()
    seconds = time.perf_counter() - started
    processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(process).ru_maxrss for process in processes)
    return units / seconds, 1024 * peak


def run_interleaved(make_work, make_peer_work, repeats):
    """Returns (units per second, peak memory) of both, and the ratio of their rates."""
    runs, peer_runs = [], []
    with new_process() as pool, new_process() as peer_pool:
        pool.submit(_set_up, make_work).result()
        peer_pool.submit(_set_up, make_peer_work).result()
        sides = [(runs, pool), (peer_runs, peer_pool)]
        for _ in range(repeats):
            for side_runs, side_pool in sides:
                side_runs.append(side_pool.submit(_time_once).result())
            sides.reverse()  # neither side always goes first
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(runs, peer_runs, strict=True))
    ours, theirs = (
        (statistics.median(rate for rate, _ in side), max(peak for _, peak in side))
        for side in (runs, peer_runs)
    )
    return ours, theirs, ratio


def missing_requirement(platform, parts):
    """Describes what the machine lacks for the comparisons; empty if nothing."""
    needed = ["torch", "transformers"]
    if platform == "cpu" and "train" in parts:
        needed.append("llms_from_scratch")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: see the first lines of this file"
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if platform == "cpu" and threads < cores:
        return f"PyTorch uses {threads} of {cores} cores: set OMP_NUM_THREADS={cores}"
    if platform != "cpu" and not (platform == "gpu" and torch.cuda.is_available()):
        return f"PyTorch is compared on CPUs and NVIDIA GPUs, and finds no {platform}"
    return ""


def cpu_comparisons(config):
    """Lists name, tag, unit, peer and alternatives: pairs of works with metrics."""
    from gptjax.bench import workloads
    from tests.benchmarks import torch_workloads

    rows = [
        ("train", "b2", "tokens/s", "transformers", {"rows": 2, "context": 256}),
        ("train", "b4", "tokens/s", "transformers", {"rows": 4, "context": 256}),
        ("train", "b4", "tokens/s", "book", {"rows": 4, "context": 256}),
        ("decode", "b1", "tokens/s", "transformers", {"rows": 1, "new": NEW_TOKENS}),
        ("decode", "b8", "tokens/s", "transformers", {"rows": 8, "new": NEW_TOKENS}),
        ("prefill", "b1", "tokens/s", "transformers", {"rows": 1, "context": 512}),
        ("load", "safetensors", "models/s", "transformers", {}),
        ("start", "", "s", "transformers", {}),
        ("input", "", "bytes/s", "tiktoken", {}),
    ]
    comparisons, our_names = [], {"start": "startup", "input": "prepare"}
    for name, tag, unit, peer, options in rows:
        subject = len(os.sched_getaffinity(0)) if name == "input" else config
        make_work = getattr(workloads, f"make_{our_names.get(name, name)}_work")
        make_peer_work = getattr(torch_workloads, f"{peer}_{name}")
        works = [partial(make, subject, **options) for make in (make_work, make_peer_work)]
        comparisons.append((name, tag, unit, peer, [(*works, {})]))
    return comparisons


def gpu_comparisons(preset, best):
    """Lists comparisons as `cpu_comparisons`, with alternatives if memory is full."""
    from gptjax.bench import workloads
    from tests.benchmarks import torch_workloads

    config, comparisons, alternatives = GPTConfig.preset(preset, remat="none"), [], []
    if "train_rows" in best:
        train_config = dataclasses.replace(config, attention=best["train_attention"])
        for rows in (best["train_rows"], max(best["train_rows"] // 2, 1)):
            options = {"rows": rows, "context": best["context"]}
            work = partial(workloads.make_train_work, train_config, **options)
            peer = partial(torch_workloads.transformers_train, config, device="cuda", **options)
            alternatives.append((work, peer, {"train_rows_transformers_device": rows}))
        comparisons.append(("train", "device", "tokens/s", "transformers", alternatives))
    for rows in (1, 8):
        options = {"rows": rows, "new": NEW_TOKENS}
        work = partial(workloads.make_decode_work, config, **options)
        peer = partial(torch_workloads.transformers_decode, config, device="cuda", **options)
        key = f"decode_cache_transformers_device_b{rows}"
        caches = ("static", "dynamic")  # fastest first
        alternatives = [(work, partial(peer, cache=cache), {key: cache}) for cache in caches]
        comparisons.append(("decode", f"device_b{rows}", "tokens/s", "transformers", alternatives))
    return comparisons


def compare(comparison, repeats):
    """Returns the metrics of the first alternative that works; empty if none does."""
    name, tag, unit, peer, alternatives = comparison
    for make_work, make_peer_work, metrics in alternatives:
        try:
            ours, theirs, ratio = run_interleaved(make_work, make_peer_work, repeats)
        except Exception as error:  # out of memory above all
            print(f"{name} {tag}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
            continue
        end = f"_{tag}" if tag else ""
        for key, (rate, peak_bytes) in ((name + end, ours), (f"{name}_{peer}{end}", theirs)):
            metrics |= {key: 1 / rate if unit == "s" else rate, f"{key}_peak_bytes": peak_bytes}
            print(f"{key:<40}{metrics[key]:12.4g} {unit}", flush=True)
        metrics[f"{name}_ratio_{peer}{end}"] = ratio
        print(f"{f'{name}_ratio_{peer}{end}':<40}{ratio:12.3f}", flush=True)
        return metrics
    return {}


def run_suite(make_options, preset, repeats, parts):
    from gptjax.bench import suite

    options = getattr(suite, make_options)(preset, repeats)
    with log_to_console():
        return [*suite.run_benchmarks(options, parts)][-1]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers")
    parser.add_argument("--preset", default="gpt2", help="size of GPT-2")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--json", type=Path, help="file of all metrics")
    parser.add_argument("--fast-cpu", action="store_true", help="as in gptjax bench")
    args = parser.parse_args(argv)
    if args.fast_cpu:
        cpu_flags.enable_fast_cpu()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both sides share the GPU
    parts = args.only or PARTS
    metrics = in_new_process(run_suite, "make_machine_options", args.preset, args.repeats, [])
    config = GPTConfig.preset(args.preset, dtype="float32", remat="none")
    if missing := missing_requirement(metrics["platform"], parts):
        parser.error(missing)
    own_parts = ["train"] if "train" in parts else []
    if metrics["platform"] == "gpu":
        metrics |= in_new_process(run_suite, "make_device_options", args.preset, 5, own_parts)
        comparisons = gpu_comparisons(args.preset, metrics)
    else:
        comparisons = cpu_comparisons(config)
        if own_parts:
            from tests.benchmarks.torch_workloads import torch_matmul

            metrics["torch_matmul"] = in_new_process(torch_matmul, args.repeats)
    failed = False
    for comparison in comparisons:
        if comparison[0] in parts:
            found = compare(comparison, args.repeats)
            failed = failed or not found
            metrics |= found
            if args.json:
                args.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
