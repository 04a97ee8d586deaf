"""Commands about runs: `gptjax watch`."""

from pathlib import Path

import click

from gptjax.cli.arguments import PATH, Command, flag_option


@click.command("watch", cls=Command)
@click.argument("run_dir", metavar="RUN", type=PATH)
@flag_option("--once", "print one view and exit")
def run_watch(run_dir: Path, once: bool) -> int:
    """Follow a run: state, time left, latest values and loss curve.

    RUN is a run folder, on this machine or on another one that shares the folder. Its
    files are read, and nothing is written. The command ends with the run; the exit code
    is 1 if that failed or died.
    """
    from gptjax.cli.watch import watch_run
    from gptjax.runtime.preemption import Interrupted

    try:
        status = watch_run(run_dir, once=once)
    except Interrupted:  # the usual end
        return 0
    return 1 if status.state in ("failed", "dead") else 0
