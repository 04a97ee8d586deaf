"""Time of a token and memory of a step against the length of a row, as a picture.

python tests/benchmarks/growth.py OUT.png [LAYERS WIDTH]
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from gptjax.bench.ours import CHUNK, random_tokens
from gptjax.config import GPTConfig
from gptjax.data.batches import pack
from gptjax.loss import next_token_loss
from gptjax.model import init

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BACKENDS = ("plain", "prefix", "blockwise")
TIMES = 3


def measured(backend: str, length: int, layers: int, width: int) -> tuple[float, float]:
    """Microseconds a token, and MiB of temporaries, of the gradient of one row."""
    config = GPTConfig(
        vocab_size=256,
        context_length=length,
        n_layers=layers,
        n_heads=width // 64,
        d_model=width,
        attention=backend,
        dtype="float32",
    )
    key = jax.random.key(0)
    params = jax.jit(functools.partial(init, config))(key)
    batch = jax.tree.map(jnp.asarray, pack(random_tokens(1, length + 1, 256), None))
    loss = next_token_loss(config, CHUNK, False)
    program = jax.jit(jax.grad(lambda params: loss(params, batch, key)[0]))
    compiled = program.lower(params).compile()
    seconds = []
    for _ in range(TIMES + 1):
        started = time.perf_counter()
        jax.block_until_ready(compiled(params))
        seconds.append(time.perf_counter() - started)
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return statistics.median(seconds[1:]) / length * 1e6, memory


def main(out: Path, layers: int = 4, width: int = 256) -> None:
    """Measures every backend at every length, says it and draws it."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for backend in BACKENDS:
        found = [measured(backend, length, layers, width) for length in LENGTHS]
        for length, (micro, memory) in zip(LENGTHS, found, strict=True):
            print(f"{backend:<10}{length:>6}{micro:10.1f} us a token{memory:10.1f} MiB")
        for axis, values in zip(axes, zip(*found, strict=True), strict=True):
            axis.plot(LENGTHS, values, marker="o", label=backend)
    for axis, title in zip(
        axes, ("microseconds a token", "MiB of temporaries, one row"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="T", title=title)
        axis.set_xticks(LENGTHS, LENGTHS)
        axis.minorticks_off()
        axis.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
