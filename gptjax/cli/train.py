"""The commands `gptjax train` and `gptjax quickstart`."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, ConfigCommand, flag_option, value_option
from gptjax.cli.session import log_to_console, setup_session
from gptjax.config import Range, find_config, load_config
from gptjax.runtime import supervisor
from gptjax.runtime.preemption import set_signal_mode
from gptjax.runtime.terminal import print_progress
from gptjax.runtime.timing import mark_phase


@click.command("quickstart", cls=Command)
@value_option("--run", "run folder", Path("runs/quickstart"), type=PATH, metavar="DIR")
@arguments.session_arguments
def run_quickstart(run: Path, verbose: bool) -> None:
    """Train a small GPT, a classifier and an assistant in minutes.

    The texts come with Python, so nothing is downloaded. The same command resumes.
    """
    setup_session(verbose, "first step")
    from gptjax.tasks.quickstart import quickstart

    mark_phase("importing")
    with log_to_console():
        quickstart(run)


@click.command("train", cls=ConfigCommand, options_metavar="[--section.option VALUE ...] [OPTIONS]")
@click.argument("config_name", metavar="CONFIG.toml")
@value_option("--run", "run folder", type=PATH, shown="runs/CONFIG", metavar="DIR", dest="run_dir")
@value_option(
    "--distributed",
    "train as process I of N, counted from 0; HOST:PORT is a free port of the "
    "host of process 0; auto asks the scheduler (Slurm, GKE, TPU pods)",
    shown="a single process",
    metavar="auto|HOST:PORT,N,I",
)
@value_option(
    "--allow-change",
    "option that may differ from the config of the run that is resumed; may be repeated",
    multiple=True,
    metavar="SECTION.OPTION",
)
@value_option(
    "--on-spike",
    "after a spike of the loss or gradient norm: log it, or skip such updates",
    type=click.Choice(["log", "skip"]),
    shown="that of the run, or log",
)
@flag_option("--auto-restart", "restart the run after a crash or hang, with a back-off")
@value_option(
    "--hang-timeout",
    "--auto-restart: time without a step, evaluation or save that counts as a hang",
    supervisor.HANG_TIMEOUT_SECONDS,
    metavar="SECONDS",
    valid_range=Range(1, 10**8),
)
@arguments.session_arguments
@click.pass_context
def run_train(
    ctx: click.Context,
    config_name: str,
    overrides: list[str],
    run_dir: Path | None,
    distributed: str | None,
    allow_change: tuple[str, ...],
    on_spike: str | None,
    auto_restart: bool,
    hang_timeout: float,
    verbose: bool,
) -> int:
    """Train as a config says; the same command resumes.

    CONFIG.toml is a file or the name of a built-in config, such as tiny. Options of the
    config are listed below by section; they replace those of the file.
    """
    path = find_config(config_name)
    run_dir = run_dir or Path("runs") / path.stem
    if auto_restart:
        words = [word for word in ctx.obj if word != "--auto-restart"]
        return supervisor.supervise([sys.executable, "-m", "gptjax", *words], hang_timeout)
    supervisor.init_child()
    with contextlib.ExitStack() as stack:
        if distributed:
            from gptjax.parallel.distributed import abort_all_on_error, initialize

            initialize(distributed)
            set_signal_mode("collective")
            stack.enter_context(abort_all_on_error())
        config = arguments.apply_overrides(load_config(path), overrides)
        setup_session(verbose, "first step")
        import jax

        from gptjax.tasks.train import train

        mark_phase("importing")
        if jax.process_index() == 0:
            stack.enter_context(log_to_console())
        model = train(config, run_dir, allow_change=allow_change, on_spike=on_spike or "")
        if jax.process_index() == 0:
            print_progress(f"next     {next_command(model, run_dir)}")
    return 0


def next_command(model: Any, run_dir: Path) -> str:
    """Command that uses a trained model."""
    if model.labels:
        return f"gptjax classify {shlex.quote(str(run_dir))} 'a text'"
    if model.chat_template:
        return f"gptjax chat {shlex.quote(str(run_dir))}"
    return f"gptjax generate {shlex.quote(str(run_dir))} 'Once upon a time'"
