"""The command `gptjax bench`."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, flag_option, list_option, value_option
from gptjax.config import GPTConfig

PARTS = ("train", "decode", "prefill", "load", "input", "import", "start", "save")
ATTENTION = get_args(get_type_hints(GPTConfig)["attention"])


@click.command("bench", cls=Command)
@value_option("--preset", "GPT-2 size: gpt2, gpt2-medium, gpt2-large or gpt2-xl", "gpt2")
@value_option("--repeats", "timed runs", 5, type=click.IntRange(1), metavar="N")
@list_option(
    "--only",
    f"benchmarks to run: {', '.join(PARTS)}",
    kind=click.Choice(PARTS),
    shown="all, with --device train,decode,prefill",
    metavar="PART",
)
@flag_option(
    "--device",
    "benchmark an accelerator: each attention backend, its throughput and its share of the peak",
)
@value_option(
    "--context",
    "sequence length in training",
    type=click.IntRange(1),
    shown="256, with --device 1024",
    metavar="T",
)
@list_option(
    "--rows",
    "rows per batch and device in training, tried until memory is full",
    kind=click.IntRange(1),
    shown="2,4,8, with --device 4,8,16,32,64,128",
)
@list_option(
    "--attention",
    f"attention backends in training: {', '.join(ATTENTION)}",
    kind=click.Choice(ATTENTION),
    shown="auto, with --device all that support it",
    metavar="NAME",
)
@value_option("--json", "write all metrics as JSON", type=PATH, dest="json_path")
@arguments.fast_cpu_argument
def run_bench(
    preset: str,
    repeats: int,
    only: tuple[str, ...],
    device: bool,
    context: int | None,
    rows: tuple[int, ...],
    attention: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Measure the speed of training, decoding and startup."""
    from gptjax.bench import suite

    make_options = suite.make_device_options if device else suite.make_machine_options
    options = make_options(preset, repeats, functools.partial(print, flush=True))
    given: Any = {"context": context, "train_batch_sizes": rows, "backends": attention}
    options = dataclasses.replace(options, **{name: x for name, x in given.items() if x})
    metrics = suite.run_benchmarks(options, only or (suite.DEVICE_PARTS if device else PARTS))
    if json_path:
        json_path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
