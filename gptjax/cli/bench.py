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
@value_option(
    "--preset", default="gpt2", text="GPT-2 size: gpt2, gpt2-medium, gpt2-large or gpt2-xl"
)
@value_option("--repeats", type=click.IntRange(1), default=5, metavar="N", text="timed runs")
@list_option(
    "--only",
    kind=click.Choice(PARTS),
    shown="all, with --device train,decode,prefill",
    metavar="PART",
    text=f"benchmarks to run: {', '.join(PARTS)}",
)
@flag_option(
    "--device",
    text="benchmark an accelerator: each attention backend, its throughput and its "
    "share of the peak",
)
@value_option(
    "--context",
    type=click.IntRange(1),
    shown="256, with --device 1024",
    metavar="T",
    text="sequence length in training",
)
@list_option(
    "--rows",
    kind=click.IntRange(1),
    shown="2,4,8, with --device 4,8,16,32,64,128",
    metavar="N",
    text="rows per batch and device in training, tried until memory is full",
)
@list_option(
    "--attention",
    kind=click.Choice(ATTENTION),
    shown="auto, with --device all that support it",
    metavar="NAME",
    text=f"attention backends in training: {', '.join(ATTENTION)}",
)
@value_option("--json", "json_path", type=PATH, text="write all metrics as JSON")
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
