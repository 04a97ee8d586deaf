"""The command `gptjax bench`."""

import functools
import json
from pathlib import Path
from typing import Any

import click

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, flag_option, list_option, value_option

PARTS = [*("train", "decode", "prefill", "load", "input", "import", "start", "compile"), "save"]


@click.command("bench", cls=Command)
@value_option(
    "--preset", default="gpt2", text="GPT-2 size: gpt2, gpt2-medium, gpt2-large or gpt2-xl"
)
@flag_option("--peers", text="compare with PyTorch, interleaved")
@value_option("--repeats", type=int, default=5, text="timed runs of each side")
@list_option(
    "--only",
    kind=click.Choice(PARTS),
    shown="all",
    metavar="PART",
    text=f"benchmarks to run: {', '.join(PARTS)}",
)
@flag_option(
    "--device",
    text="benchmark an accelerator: each attention backend, its throughput and its "
    "share of the peak",
)
@value_option(
    "--context", type=int, default=1024, metavar="T", text="--device: sequence length in tokens"
)
@list_option(
    "--rows",
    kind=click.INT,
    default=[4, 8, 16, 32, 64, 128],
    metavar="N",
    text="--device: rows per batch, tried until memory is full",
)
@list_option(
    "--attention", shown="all that support the device", text="--device: attention backends"
)
@value_option("--json", "json_path", type=PATH, text="write all metrics as JSON")
@arguments.fast_cpu_argument
def run_bench(
    preset: str,
    peers: bool,
    repeats: int,
    only: tuple[str, ...],
    device: bool,
    context: int,
    rows: tuple[int, ...],
    attention: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Measure the speed of training, decoding and startup."""
    log = functools.partial(print, flush=True)
    if device and peers:
        from gptjax.bench.compare_torch import bench_against_torch

        metrics = bench_against_torch(
            log,
            preset=preset,
            context=context,
            repeats=repeats,
            device_flags=sweep_flags(rows, attention, only),
            only=only,
        )
    elif device:
        from gptjax.bench.device import bench_device
        from gptjax.config import GPTConfig

        shape: Any = {"context_length": context, "remat": "none"}
        config = GPTConfig.preset(preset, **shape)
        metrics = bench_device(config, log, rows, backends=attention, only=only)
    else:
        from gptjax.bench.suite import bench_machine

        metrics = bench_machine(log, preset=preset, peers=peers, repeats=repeats, only=only)
    if json_path:
        json_path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def sweep_flags(
    rows: tuple[int, ...], attention: tuple[str, ...], only: tuple[str, ...]
) -> list[str]:
    """Flags of `gptjax bench --device` that select what is measured."""
    lists = {"--rows": rows, "--attention": attention, "--only": only}
    return [
        word
        for flag, values in lists.items()
        if values
        for word in (flag, ",".join(map(str, values)))
    ]
