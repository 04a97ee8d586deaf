"""Commands about runs: `gptjax watch`."""

from pathlib import Path

import click

from gptjax.cli.arguments import PATH, Command, flag_option, value_option
from gptjax.config import Range
from gptjax.errors import ConfigError


@click.command("watch", cls=Command)
@click.argument("run_dir", metavar="RUN", type=PATH)
@flag_option("--once", "print one view and exit")
@flag_option("--browser", "serve the view as a page of this machine that updates itself")
@value_option("--port", "--browser: port of the page; 0 = any", 8265, valid_range=Range(0, 65535))
def run_watch(run_dir: Path, once: bool, browser: bool, port: int) -> int:
    """Follow a run: state, time left, latest values and loss curve.

    RUN is a run folder, on this machine or on another one that shares the folder. Its
    files are read, and nothing is written. The command ends with the run; the exit code
    is 1 if that failed or died. `ssh -L 8265:127.0.0.1:8265 HOST` forwards the page of
    another machine.
    """
    if once and browser:
        raise ConfigError("--once excludes --browser.")
    from gptjax.runtime.preemption import Interrupted

    try:
        if browser:
            from gptjax.cli.watch_page import serve_run

            serve_run(run_dir, port)
            return 0
        from gptjax.cli.watch import watch_run

        status = watch_run(run_dir, once=once)
    except Interrupted:  # the usual end
        return 0
    return 1 if status.state in ("failed", "dead") else 0
