"""What a run will cost, by arithmetic: parameters, FLOPs, memory, traffic."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gptjax import tokenizer as tokenizers
from gptjax.attention.choice import chosen_backend
from gptjax.chips import chip_of
from gptjax.config import GPTConfig, RunConfig
from gptjax.model import compute_dtype, init
from gptjax.tree import count

ROOM = 0.95  # of a device's memory that a plan may fill
AT_REST = ("parameters", "AdamW moments")  # contributors to memory between steps
ONE_DEVICE = (1, 1, 1)


@functools.cache  # each line of a run's log asks for it
def parameter_count(config: GPTConfig) -> int:
    """Numbers to train, found without making them."""
    return count(jax.eval_shape(lambda: init(config, jax.random.key(0))))


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward FLOPs per token: 6 P + 12 N D T.

    P counts what is multiplied: all parameters but the position table (and but the
    token table where the head is another one). The second term is attention over
    the full square, as in Chowdhery et al. 2022, appendix B; causal kernels do half.
    """
    multiplied = parameter_count(config) - config.context_length * config.d_model
    if not config.tie_embeddings:
        multiplied -= config.padded_vocab_size * config.d_model
    return 6 * multiplied + attention_flops(config)


def attention_flops(config: GPTConfig) -> int:
    """Those of scores and mixing, forward and backward, per token: 12 N D T."""
    return 12 * config.n_layers * config.d_model * config.context_length


def causal_flops_per_token(config: GPTConfig) -> int:
    """`flops_per_token` with attention over the half of the square that is seen."""
    return flops_per_token(config) - attention_flops(config) // 2


def hardware_flops(config: GPTConfig) -> float:
    """FLOPs per token with what the backward pass computes again: a forward pass."""
    again = 4 / 3 if config.remat == "full" else 1.0
    return flops_per_token(config) * again


def settled(run: RunConfig, platform: str = "") -> RunConfig:
    """The run with its vocabulary, dtype and attention named, without its data.

    Args:
        run: of a model of its own.
        platform: "cpu", "gpu" or "tpu"; "" = this one.

    Raises:
        ConfigError: the attention cannot be computed there.
    """
    model = run.model
    name = run.data.tokenizer or "gpt2"
    if not model.vocab_size and name.startswith("bpe:"):
        model = dataclasses.replace(model, vocab_size=int(name[4:]))
    elif not model.vocab_size:
        size = tokenizers.load(name).vocab_size
        model = dataclasses.replace(model, vocab_size=size)
    if platform and model.dtype == "auto":
        dtype: Any = "float32" if platform == "cpu" else "bfloat16"
        model = dataclasses.replace(model, dtype=dtype)
    attention: Any = chosen_backend(
        model.attention,
        length=model.context_length,
        head_width=model.head_width,
        dtype=compute_dtype(model),
        dropout=model.dropout,
        platform=platform,
    )
    model = dataclasses.replace(model, attention=attention)
    return dataclasses.replace(run, model=model)


def memory_bytes(run: RunConfig, sizes: Sequence[int] = ONE_DEVICE) -> dict[str, int]:
    """Bytes of one device's memory by contributor; the activations are an estimate.

    Args:
        run: `settled`; its `train.accumulate` is the number of micro-batches.
        sizes: of the mesh, as `gptjax.sharding.AXES`.
    """
    c, params = run.model, parameter_count(run.model)
    data, fsdp, tensor = sizes
    size = compute_dtype(c).itemsize
    rows = max(run.data.batch_size // run.train.accumulate // (data * fsdp), 1)
    tokens = rows * c.context_length
    held = params // (fsdp * tensor)
    table = c.padded_vocab_size * c.d_model
    every, products = activation_bytes(c, size, tensor)
    kept = {"none": every, "dots": products, "full": c.d_model * size}[c.remat]
    again = 0 if c.remat == "none" else every // 2  # of the layer computed again
    chunk = tokens * min(run.train.loss_chunk, c.context_length) // c.context_length
    parts = {
        "parameters": 4 * held,
        "AdamW moments": 8 * held,
        "gradients": (4 if run.train.accumulate == 1 else 8) * held,
        "activations": tokens * (c.n_layers * kept + again),
        "logits": 2 * 4 * chunk * c.padded_vocab_size // tensor,
        "vocabulary": (4 + size) * table // tensor,  # gathered, and its gradient
    }
    if size < 4:
        parts[f"{c.dtype} copy"] = size * (held - table // (fsdp * tensor))
    return parts


def activation_bytes(c: GPTConfig, size: int, tensor: int) -> tuple[int, int]:
    """Bytes of one token that one layer keeps for backward: of all, of products alone.

    Products are query, key, value, mixed heads and what leaves attention, the MLP's
    hidden layer and what leaves it; with them comes the residual stream. All else is
    float32 in the norms, and seven arrays as wide as the hidden layer in and around
    the GELU; these counts are what TPU's compiler comes to.
    """
    whole, heads, hidden = c.d_model, 4 * c.d_model, c.mlp_width
    products = size * (4 * whole + (heads + hidden) // tensor)
    every = (6 * 4 + 4 * size) * whole + size * (heads + 7 * hidden) // tensor
    if c.attention in ("plain", "prefix", "xla"):
        every += c.n_heads * c.context_length * (4 + size) // tensor
    return every, products


def memory_traffic(run: RunConfig, sizes: Sequence[int] = ONE_DEVICE) -> int:
    """Bytes that a device's memory moves in a step, at least.

    Weights are read three times a micro-batch; what is kept for the backward pass is
    written and read; AdamW reads four numbers of each parameter and writes three.
    """
    parts = memory_bytes(run, sizes)
    size = compute_dtype(run.model).itemsize
    weights = parameter_count(run.model) * size // sizes[2]
    each = 3 * weights + 2 * parts["activations"] + 2 * parts["logits"]
    return run.train.accumulate * each + 7 * parts["parameters"]


def with_micro_batch(
    run: RunConfig, sizes: Sequence[int], limit: int | float
) -> RunConfig:
    """The run with the fewest micro-batches that fit; the most, where none do.

    Args:
        run: `settled`; its `train.accumulate` is replaced.
        sizes: of the mesh.
        limit: bytes of a device's memory.
    """
    rows, shards = run.data.batch_size, sizes[0] * sizes[1]
    chosen = run
    for parts in range(1, rows + 1):
        if rows % parts or rows // parts % shards:
            continue
        train = dataclasses.replace(run.train, accumulate=parts)
        chosen = dataclasses.replace(run, train=train)
        if sum(memory_bytes(chosen, sizes).values()) <= ROOM * limit:
            break
    return chosen


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None where it is not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops * jax.device_count() if chip else None


def device_memory() -> int:
    """Bytes of memory that one device of this process may use."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_memory()


def host_memory() -> int:
    """Bytes of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes of this machine's memory that a new program may take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return host_memory()
    sizes = [int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    return 1024 * sizes[0] if sizes else host_memory()


def human(size: int | float) -> str:
    """A size in bytes for people.

    >>> human(1.6e9)
    '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
