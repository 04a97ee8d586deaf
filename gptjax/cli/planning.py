"""The command `gptjax plan`."""

import json
import os
from pathlib import Path

import click

from gptjax.cli.arguments import PATH, ConfigCommand, apply_overrides, flag_option, value_option
from gptjax.cli.session import log_to_stderr
from gptjax.config import find_config, load_config
from gptjax.errors import install_command


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
        log_to_stderr(f"compiling for {target} ...")
    result = plan.make_plan(config, target, run_compiler)
    print(json.dumps(result.to_dict()) if as_json else "\n".join(plan.format_plan(result)))
    if not run_compiler and not no_compile and target.chip.platform == "tpu":
        log_to_stderr(f"For the compiler's own figures: {install_command('tpu-plan')}")
    if compare_profile:
        plan.compare_with_profile(result, compare_profile, print)
    return 1 if result.fits is False else 0
