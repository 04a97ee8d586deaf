"""The commands `gptjax plan` and `gptjax bench`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from gptjax.cli.arguments import (
    PATH,
    Command,
    ConfigCommand,
    Number,
    apply_overrides,
    fast_cpu_argument,
    flag_option,
    list_option,
    value_option,
)
from gptjax.cli.session import log_to_console
from gptjax.config import BATCH_SIZE, CONTEXT, GPTConfig, Range, find_config, load_config
from gptjax.errors import install_command
from gptjax.fileio.atomic import write_atomic
from gptjax.runtime.terminal import print_message, print_result

PARTS = ("train", "decode", "prefill", "load", "input", "import", "start", "save")
ATTENTION = get_args(get_type_hints(GPTConfig)["attention"])


@click.command("plan", cls=ConfigCommand, options_metavar="[--section.option VALUE ...] [OPTIONS]")
@click.argument("config_name", metavar="CONFIG.toml")
@value_option(
    "--topology",
    "devices to plan for",
    "",
    shown="the devices of this machine",
    metavar="v5e:2x4|v6e:1|v5p:2x2x4|h100:8|cpu:8",
)
@value_option(
    "--compare-profile",
    "run folder whose measurements are printed next to the plan",
    type=PATH,
    metavar="RUN",
)
@flag_option("--no-compile", "estimate everything, without the compiler")
@flag_option("--json", "print one JSON object", "as_json")
def run_plan(
    config_name: str,
    overrides: list[str],
    topology: str,
    compare_profile: Path | None,
    no_compile: bool,
    as_json: bool,
) -> int:
    """Estimate parameters, FLOPs, memory and communication of a run.

    Nothing is trained. With gptjax[tpu-plan], the compiler for TPUs is used even if
    there are none. The exit code is 1 if the run does not fit into memory.

    CONFIG.toml is a file or the name of a built-in config, such as tiny. Options of the
    config are listed below by section; they replace those of the file.
    """
    from gptjax.training.hardware import local_topology, parse_topology

    config = apply_overrides(load_config(find_config(config_name)), overrides)
    target = parse_topology(topology) if topology else local_topology()
    if topology:  # before JAX starts: else libtpu looks for a TPU
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if target.chip.platform == "cpu":
            os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(target.devices))
    from gptjax.planning import aot, plan

    run_compiler = aot.can_compile(target) and not no_compile
    if run_compiler:
        print_message(f"compiling for {target} ...")
    result = plan.make_plan(config, target, run_compiler)
    print_result(json.dumps(result.to_dict()) if as_json else "\n".join(plan.format_plan(result)))
    if not run_compiler and not no_compile and target.chip.platform == "tpu":
        print_message(f"For the compiler's own figures: {install_command('tpu-plan')}")
    if compare_profile:
        print_result("\n".join(plan.compare_with_profile(result, compare_profile)))
    return 1 if result.fits is False else 0


@click.command("bench", cls=Command)
@value_option("--preset", "GPT-2 size: gpt2, gpt2-medium, gpt2-large or gpt2-xl", "gpt2")
@value_option("--repeats", "timed runs", 5, valid_range=Range(1, 1000))
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
    type=int,
    shown="256, with --device 1024",
    metavar="T",
    valid_range=CONTEXT,
)
@list_option(
    "--rows",
    f"rows per batch and device in training ({BATCH_SIZE}), tried until memory is full",
    kind=Number(int, BATCH_SIZE),
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
@fast_cpu_argument
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
    options = make_options(preset, repeats)
    given: Any = {"context": context, "train_batch_sizes": rows, "backends": attention}
    options = dataclasses.replace(options, **{name: x for name, x in given.items() if x})
    parts = only or (suite.DEVICE_PARTS if device else PARTS)
    with log_to_console():
        for metrics in suite.run_benchmarks(options, parts):
            if json_path:  # keeps earlier results if a later benchmark fails
                write_atomic(json_path, json.dumps(metrics, indent=2) + "\n")
