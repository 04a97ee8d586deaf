"""Time of a token and memory of a step against the length of a row, as a picture.

python tests/benchmarks/growth.py OUT.png [LAYERS WIDTH]
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from gptjax.bench.workloads import LOSS_CHUNK_SIZE, random_tokens
from gptjax.config import GPTConfig
from gptjax.data.lm import make_lm_batch
from gptjax.model.gpt import init
from gptjax.training.loss import make_lm_loss_fn

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BACKENDS = ("reference", "chunked", "flash")
TIMES = 5  # of which the fastest counts: whatever else runs can only slow one down


def program(
    backend: str, length: int, layers: int, width: int
) -> tuple[Callable[[], float], float]:
    """What gives the seconds of the gradient of one row, and its temporaries in MiB."""
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
    batch = jax.tree.map(jnp.asarray, make_lm_batch(random_tokens(1, length + 1, 256), None))
    loss = make_lm_loss_fn(config, LOSS_CHUNK_SIZE, False)
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch, key)[0]))
    compiled = gradient.lower(params).compile()
    jax.block_until_ready(compiled(params))

    def timed() -> float:
        started = time.perf_counter()
        jax.block_until_ready(compiled(params))
        return time.perf_counter() - started

    return timed, compiled.memory_analysis().temp_size_in_bytes / 2**20


def main(out: Path, layers: int = 4, width: int = 256) -> None:
    """Measures the backends, in turns, at every length, says it and draws it."""
    micros = {backend: [] for backend in BACKENDS}
    memory = {backend: [] for backend in BACKENDS}
    for length in LENGTHS:
        programs = {backend: program(backend, length, layers, width) for backend in BACKENDS}
        turns = [{b: timed() for b, (timed, _) in programs.items()} for _ in range(TIMES)]
        for backend, (_, size) in programs.items():
            fastest = min(turn[backend] for turn in turns)
            micros[backend].append(fastest / length * 1e6)
            memory[backend].append(size)
            told = f"{micros[backend][-1]:10.1f} us a token{size:10.1f} MiB"
            print(f"{backend:<10}{length:>6}{told}", flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = "microseconds a token, forward and backward", "MiB of temporaries, one row"
    for axis, found, title in zip(axes, (micros, memory), titles, strict=True):
        for backend, values in found.items():
            axis.plot(LENGTHS, values, marker="o", label=backend)
        axis.set(xscale="log", yscale="log", xlabel="T", title=title)
        axis.set_xticks(LENGTHS, LENGTHS)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("{x:,.0f}")
        axis.tick_params(which="minor", axis="y", labelsize=7)
        axis.grid(alpha=0.3)
    first = memory["flash"][-1]
    line = [first * length / LENGTHS[-1] for length in LENGTHS]
    axes[1].plot(LENGTHS, line, "k:", linewidth=1, label="in proportion to T")
    for axis in axes:
        axis.minorticks_on()
        axis.xaxis.set_tick_params(which="minor", bottom=False)
        axis.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
