"""Commands about runs: `gptjax compare`, `watch`, `check` and `track`."""

import contextlib
import io
import shlex
from pathlib import Path
from typing import Any, get_args

import click

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, flag_option, value_option
from gptjax.cli.session import log_to_console, setup_session
from gptjax.config import Range, TrackerName
from gptjax.errors import ConfigError, ModelError, ResourceError
from gptjax.runtime.terminal import print_message, print_progress, print_result


@click.command("compare", cls=Command)
@click.argument("run_dirs", metavar="RUN RUN [...]", nargs=-1, type=PATH)
@value_option(
    "--x",
    "axis of the loss curves: steps, tokens, seconds or flops",
    "steps",
    type=click.Choice(["steps", "tokens", "seconds", "flops"]),
    dest="axis",
)
@value_option(
    "--text",
    "text, table or folder whose documents the models are compared on",
    type=PATH,
    shown="the validation text of the runs",
)
@value_option(
    "--max-bytes",
    "text that the models are compared on, in bytes; of more, evenly spaced documents",
    1_000_000,
    valid_range=Range(1, 10**12),
)
@value_option("--out", "picture of the loss curves", Path("compare.png"), type=PATH)
@flag_option("--markdown", "print the tables as Markdown")
@arguments.session_arguments
def run_compare(
    run_dirs: tuple[Path, ...],
    axis: Any,
    text: Path | None,
    max_bytes: int,
    out: Path,
    markdown: bool,
    verbose: bool,
) -> None:
    """Compare runs: configs, effort, loss curves, and models on held-out text.

    Each model is compared with that of the first run, on the same documents; the
    confidence interval is over documents. Runs whose configs differ only in train.seed
    are seeds of one config; with three of each, configs are compared too.
    """
    if len(run_dirs) < 2:
        raise click.UsageError("compare takes at least two run folders.")
    setup_session(verbose)
    from gptjax.cli import compare
    from gptjax.evaluation.run_comparison import read_run_records

    runs = read_run_records(run_dirs)
    compare.write_comparison_figure(runs, axis, out)
    lines = compare.format_table("run", compare.format_runs(runs), markdown=markdown)
    lines += compare.format_table("option", compare.format_changes(runs), markdown=markdown)
    print_result("\n".join(lines))
    with log_to_console(print_message):
        sentences = compare.compare_run_models(runs, text, max_bytes)
    print_result("\n\n".join([*sentences, *compare.compare_groups(runs)]))
    print_message(f"wrote    {out}")


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


@click.command("check", cls=Command)
@click.argument("run_dir", metavar="RUN", type=PATH)
def run_check(run_dir: Path) -> int:
    """Compare a finished run with the expected results of its config.

    Exit code 0: all results are as expected; 1: one is not; 2: there are none, or the
    options of the run differ from those of the config.
    """
    from gptjax.training.expected_results import check_results

    config, checks = check_results(run_dir)
    expect = config.expect
    origin = " ".join(filter(None, [expect.date, expect.machine and f"on {expect.machine}"]))
    origin += f", {expect.commit}" * bool(expect.commit)
    print_result(f"expected results of {expect.config}, {expect.source} {origin}".rstrip())
    for check in checks:
        found = "not measured" if check.found is None else f"{check.found:.4f}"
        verdict = "" if expect.changes else "  ok" if check.is_met else "  NOT as expected"
        interval = f"{check.lowest:g} to {check.highest:g}"
        print_result(f"{check.name:<22} expected {interval:<18} found {found}{verdict}")
    if expect.changes:
        raise ModelError(
            f"the run in {run_dir} has other options than {expect.config}, so these results are "
            f"not expected of it: {'; '.join(expect.changes)}. Train the config unchanged."
        )
    return 0 if all(check.is_met for check in checks) else 1


@click.command("track", cls=Command)
@click.argument("run_dir", metavar="RUN", type=PATH)
@value_option(
    "--to",
    "tracker; needs the extra of this name",
    required=True,
    type=click.Choice(get_args(TrackerName)),
    metavar="|".join(get_args(TrackerName)),
    dest="tracker",
)
def run_track(run_dir: Path, tracker: str) -> None:
    """Send a run to an experiment tracker.

    RUN is a run folder, of a finished run or not. Events that the tracker has
    already are not sent again. Weights & Biases gets it through `wandb sync`, or at
    once if WANDB_API_KEY is set. Training with --track.to NAME sends a run while it
    trains.
    """
    from gptjax.tracking import follow, trackers

    if not (run_dir / "metrics.jsonl").is_file():
        raise ModelError(
            f"{run_dir} is not the folder of a run: it has no metrics.jsonl. Give the folder of "
            "`gptjax train --run DIR`."
        )
    trackers.check_installed(tracker)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints advice
            num_sent = follow.follow_run(run_dir, tracker, lambda: False)
    except ModelError:
        raise
    except Exception as error:  # of any tracker
        reason = follow.describe_failure(error, tracker)
        raise ResourceError(f"{reason}. Fix this, then run the same command again.") from error
    print_progress(f"sent     {num_sent:,} events and pictures of {run_dir} to {tracker}")
    folder = shlex.quote(str(run_dir / follow.TRACKING_DIR))
    print_progress(f"next     {trackers.VIEW_COMMANDS[tracker].format(folder=folder)}")
