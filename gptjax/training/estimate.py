"""Analytic estimates of parameters, FLOPs, memory and memory traffic."""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import GPTConfig, RunConfig
from gptjax.data.token_files import is_prepared_dir
from gptjax.fileio.paths import user_path
from gptjax.model.gpt import compute_dtype, init, resolve_backend
from gptjax.tokenizer import tokenizer
from gptjax.training.hardware import chip_from_device
from gptjax.tree import num_params

USABLE_MEMORY_FRACTION = 0.95  # fraction of a device's memory that a plan may use
TRAIN_STATE_PARTS = ("parameters", "AdamW moments")  # parts of memory in use between steps
SINGLE_DEVICE_MESH = (1, 1, 1)
# Accuracy of `memory_bytes` on platforms where it was compared with the compiler.
MEMORY_ACCURACY = {"cpu": 0.15, "tpu": 0.15}


@functools.cache  # called for each line of a run's log
def parameter_count(config: GPTConfig) -> int:
    """Counts the parameters of a model without allocating them."""
    return num_params(jax.eval_shape(lambda: init(config, jax.random.key(0))))


def mesh_sizes(mesh: Mesh | None) -> tuple[int, ...]:
    """Axis sizes of the mesh of a run."""
    return tuple(mesh.shape.values()) if mesh else SINGLE_DEVICE_MESH


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward FLOPs per token: 6 P + 12 N D T.

    P counts the parameters used in matmuls: all but the position embedding (and the
    token embedding if the head is untied). The second term is unmasked attention, as
    in Chowdhery et al. 2022, appendix B; causal kernels do half of it. D is H K.
    """
    multiplied = parameter_count(config)
    if config.position == "learned":
        multiplied -= config.context_length * config.d_model
    if not config.tie_embeddings:
        multiplied -= config.padded_vocab_size * config.d_model
    return 6 * multiplied + attention_flops(config)


def attention_flops(config: GPTConfig) -> int:
    """FLOPs of unmasked attention per token, with backward: 12 N H K T."""
    return 12 * config.n_layers * config.n_heads * config.actual_head_dim * config.context_length


def causal_flops_per_token(config: GPTConfig) -> int:
    """`flops_per_token` without the masked half of attention."""
    return flops_per_token(config) - attention_flops(config) // 2


def hardware_flops(config: GPTConfig) -> float:
    """FLOPs per token including recomputation by `model.remat`."""
    recompute_factor = 4 / 3 if config.remat == "full" else 1.0
    return flops_per_token(config) * recompute_factor


def resolve_config(config: RunConfig, platform: str = "") -> RunConfig:
    """Resolves vocabulary size, dtype and attention backend without reading data.

    The platform is "cpu", "gpu" or "tpu"; "" = this machine's.
    """
    model = config.model
    if not model.vocab_size:
        source = user_path(config.data.source)
        default = f"{source}/tokenizer" if is_prepared_dir(source) else "gpt2"
        name = config.data.tokenizer or default
        size = tokenizer.untrained_vocab_size(name)
        size = size or tokenizer.load_tokenizer(name).vocab_size
        model = dataclasses.replace(model, vocab_size=size)
    if platform and model.dtype == "auto":
        model = dataclasses.replace(model, dtype="float32" if platform == "cpu" else "bfloat16")
    attention: Any = resolve_backend(model, platform)
    model = dataclasses.replace(model, attention=attention)
    return dataclasses.replace(config, model=model)


def memory_bytes(
    config: RunConfig, mesh_shape: Sequence[int] = SINGLE_DEVICE_MESH, platform: str = ""
) -> dict[str, int]:
    """Bytes per device by part; those of activations are an estimate.

    `config` is from `resolve_config`, for the same platform; `mesh_shape` has the sizes
    of `MESH_AXES`.
    """
    c, total_params = config.model, parameter_count(config.model)
    is_cpu = (platform or jax.default_backend()) == "cpu"
    data, fsdp, tensor = mesh_shape
    itemsize = compute_dtype(c).itemsize
    rows = max(config.data.batch_size // config.train.accumulate // (data * fsdp), 1)
    tokens = rows * c.context_length
    local_params = total_params // (fsdp * tensor)
    table_size = c.padded_vocab_size * c.d_model
    all_bytes, matmul_bytes = activation_bytes(c, itemsize, tensor, is_cpu)
    saved_bytes = {"none": all_bytes, "dots": matmul_bytes, "full": c.d_model * itemsize}[c.remat]
    # Of the layer that is recomputed; only on CPUs is all of it in memory at a time.
    whole = all_bytes if is_cpu else all_bytes // 2
    recomputed_bytes = {"none": 0, "dots": all_bytes // 2, "full": whole}[c.remat]
    chunk = tokens * min(config.train.loss_chunk_size, c.context_length) // c.context_length
    parts = {
        "parameters": 4 * local_params,
        "AdamW moments": 8 * local_params,
        "gradients": (4 if config.train.accumulate == 1 else 8) * local_params,
        "activations": tokens * (c.n_layers * saved_bytes + recomputed_bytes),
    }
    logits, table = 4 * chunk * c.padded_vocab_size // tensor, 4 * table_size // tensor
    if is_cpu:  # logits use the memory of gradients and recomputed layers before those
        peak = max(logits, 3 * logits - 4 * local_params) + table
        return parts | {"logits": max(peak - tokens * recomputed_bytes, 0)}
    parts["logits"] = 2 * logits
    parts["vocabulary"] = table + itemsize * table_size // tensor  # gradient, gathered copy
    if itemsize < 4:
        parts[f"{c.dtype} copy"] = itemsize * (local_params - table_size // (fsdp * tensor))
    return parts


def activation_bytes(
    config: GPTConfig, itemsize: int, tensor: int, is_cpu: bool
) -> tuple[int, int]:
    """Bytes saved for backward per token and layer: (all, matmuls only).

    The residual stream is counted with the matmul outputs. The rest is float32 arrays
    in the norms, normalized queries and keys, keys and values repeated for grouped
    heads, and arrays of MLP width around the activation: seven, as observed with the
    TPU compiler, or five with that for CPUs; two more with a gate.
    """
    features, hidden = config.d_model, config.actual_mlp_dim
    queries = config.n_heads * config.actual_head_dim
    keys = config.actual_kv_heads * config.actual_head_dim
    qkv = queries + 2 * keys
    heads = qkv + queries + (2 * queries if keys < queries else 0)
    heads += queries + keys if config.qk_norm else 0
    gates = hidden if config.mlp == "swiglu" else 0
    if is_cpu:
        matmul_bytes = itemsize * (3 * features + (qkv + hidden + gates) // tensor)
        all_bytes = itemsize * (5 * features + (heads + 5 * hidden + 2 * gates) // tensor)
        return all_bytes + config.n_heads * config.context_length * 7 // tensor, matmul_bytes
    matmul_bytes = itemsize * (4 * features + (qkv + queries + hidden + gates) // tensor)
    all_bytes = (6 * 4 + 4 * itemsize) * features
    all_bytes += itemsize * (heads + 7 * hidden + 2 * gates) // tensor
    if config.attention in ("reference", "chunked", "xla"):
        all_bytes += config.n_heads * config.context_length * (4 + itemsize) // tensor
    return all_bytes, matmul_bytes


def memory_traffic(config: RunConfig, mesh_shape: Sequence[int], platform: str) -> int:
    """Lower bound on the bytes of memory traffic per device and step.

    Weights are read three times per micro-batch; saved activations are written and
    read; AdamW reads four values per parameter and writes three.
    """
    parts = memory_bytes(config, mesh_shape, platform)
    size = compute_dtype(config.model).itemsize
    weights = parameter_count(config.model) * size // mesh_shape[2]
    bytes_per_micro_batch = 3 * weights + 2 * parts["activations"] + 2 * parts["logits"]
    return config.train.accumulate * bytes_per_micro_batch + 7 * parts["parameters"]


def fit_micro_batch(
    config: RunConfig, mesh_shape: Sequence[int], memory_limit: int | float, platform: str = ""
) -> RunConfig:
    """Sets `train.accumulate` to the smallest value that fits, else the largest.

    `config` is from `resolve_config`; the limit is in bytes per device.
    """
    rows, shards = config.data.batch_size, mesh_shape[0] * mesh_shape[1]
    candidate = config
    for num_micro_batches in range(1, rows + 1):
        if rows % num_micro_batches or rows // num_micro_batches % shards:
            continue
        train = dataclasses.replace(config.train, accumulate=num_micro_batches)
        candidate = dataclasses.replace(config, train=train)
        needed = sum(memory_bytes(candidate, mesh_shape, platform).values())
        if needed <= USABLE_MEMORY_FRACTION * memory_limit:
            break
    return candidate


def total_peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None if unknown."""
    chip = chip_from_device(jax.devices()[0].device_kind)
    return chip.peak_flops * jax.device_count() if chip else None


def device_memory() -> int:
    """Bytes of memory that one device of this process may use."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_memory()


def host_memory() -> int:
    """Bytes of host memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes of available host memory."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", path.read_text()) if path.is_file() else None
    return 1024 * int(found[1]) if found else host_memory()


def format_bytes(size: int | float) -> str:
    """Formats a size in bytes.

    >>> format_bytes(1.6e9)
    '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
