"""The view of `gptjax watch`: state, latest values and loss curve of a run."""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.plots.text_plot import text_plot
from gptjax.runtime.terminal import is_terminal, print_result, sanitize
from gptjax.runtime.timing import format_duration
from gptjax.training.metrics import best_validation, format_number, metric_series
from gptjax.training.run_status import RunStatus, read_run_status

REFRESH_SECONDS = 2.0
MAX_CPU_SHARE = 0.1  # of the time, for reading the files of a long run
MAX_PLOT_ROWS, MAX_COLUMNS = 24, 120
MAX_SAMPLE_LINES = 4
# To another screen and back (xterm); to the upper left corner; clear the screen.
ENTER_SCREEN, LEAVE_SCREEN, HOME, CLEAR_REST = "\x1b[?1049h", "\x1b[?1049l", "\x1b[H", "\x1b[J"
CLEAR_LINE = "\x1b[K"  # to its end
VALUES = {  # of a "train" event: how they are shown
    "lr": "lr {:.2e}",
    "grad_norm": "|g| {:.2f}",
    "mfu": "mfu {:.1%}",
    "input_wait": "waiting for data {:.0%}",
}


def watch_run(run_dir: Path, *, once: bool) -> RunStatus:
    """Prints the view of a run until the run ends, or `once`; returns its last state.

    A terminal shows the newest view in place. Elsewhere a line is printed for each
    change, and the view at the end.
    """
    refresh = not once
    with full_screen(refresh and is_terminal(sys.stdout)) as draw:
        while True:
            started = time.monotonic()
            status = read_run_status(run_dir)
            if once or status.state != "running":
                break
            draw(status)
            seconds = time.monotonic() - started
            time.sleep(max(REFRESH_SECONDS, seconds / MAX_CPU_SHARE))
    print_result("\n".join(format_view(status)))
    return status


@contextlib.contextmanager
def full_screen(is_screen: bool) -> Iterator[Any]:
    """Yields a function that shows a state of the run."""
    printed: list[str] = []

    def draw(status: RunStatus) -> None:
        if is_screen:
            lines = [sanitize(line) + CLEAR_LINE for line in format_view(status)]
            print_result(HOME + "\n".join(lines) + CLEAR_REST, end="", is_safe=True)
            return
        line = " | ".join([format_progress(status, time.time()), *format_values(status)])
        if line not in printed[-1:]:
            print_result(line)
            printed[:] = [line]

    if is_screen:
        print_result(ENTER_SCREEN, end="", is_safe=True)
    try:
        yield draw
    finally:
        if is_screen:
            print_result(LEAVE_SCREEN, end="", is_safe=True)


def format_view(status: RunStatus) -> list[str]:
    """Lines of the view, which fit into the terminal."""
    now, size = time.time(), shutil.get_terminal_size()
    columns = min(size.columns, MAX_COLUMNS)
    head = [f"{status.run_dir}  {format_state(status, now)}"]
    head += fill_lines([format_progress(status, now), *format_values(status)], columns)
    sample = sample_lines(status)
    rows = min(size.lines - len(head) - len(sample) - 3, MAX_PLOT_ROWS)
    plot = text_plot(
        metric_series(status.events, "train", "loss"),
        metric_series(status.events, "eval", "loss", "validation"),
        columns=columns,
        rows=rows,
        ascii_only=not can_print("⣿●│└─"),
    )
    return [head[0], *(line[: size.columns] for line in [*head[1:], "", *plot, *sample])]


def fill_lines(parts: Sequence[str], columns: int) -> list[str]:
    """Joins parts to lines of at most `columns`, unless a part is longer."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= columns:
            lines[-1] += f" | {part}"
        else:
            lines.append(part)
    return lines


def can_print(text: str) -> bool:
    """True if the encoding of stdout has these characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def format_state(status: RunStatus, now: int | float) -> str:
    """State of a run, its start or end, and whether it resumes."""
    process, state = status.process, status.state
    where = f"pid {process.pid} on {process.host}" if process.host else ""
    ago = f"for {format_age(status.since, now)}"
    if state == "running":
        return f"running {ago}, {where}"
    saved = status.last("save")
    resume = f"the same command resumes after step {saved['step']:,}" if saved else "nothing saved"
    detail = {
        "finished": ["finished at"],
        "stopped": ["stopped by a signal at", resume],
        "failed": ["failed at", process.outcome],
        "dead": ["dead since", where, resume],
    }[state]
    when = f"{detail[0]} {format_time(status.since)} ({format_age(status.since, now)} ago)"
    return "; ".join([when, *(text for text in detail[1:] if text)])


def format_progress(status: RunStatus, now: int | float) -> str:
    """Steps done; of a running run also the time left and the age of its last event."""
    if status.config is None:
        return "reading the data" if status.state == "running" else "no step was trained"
    steps = status.config.train.steps
    parts = [f"step {status.step:,}/{steps:,} ({min(status.step / steps, 1):.1%})"]
    if status.state == "running":
        left = status.seconds_left(now)
        parts += [f"eta {format_duration(left)}"] if left is not None else []
        if newest := status.last_event_time:
            parts.append(f"last event {format_age(newest, now)} ago")
    return ", ".join(parts)


def format_values(status: RunStatus) -> list[str]:
    """Latest values of a run."""
    train, values = status.last("train"), []
    if "loss" in train:
        values.append(f"loss {train['loss']:.4f}")
    if found := best_validation(status.events):
        step, best = found
        newest = metric_series(status.events, "eval", "loss", "validation")[1][-1]
        values.append(f"validation {newest:.4f} (best {best:.4f} at step {step:,})")
    _, accuracies = metric_series(status.events, "eval", "accuracy", "validation")
    values += [f"accuracy {accuracy:.4f}" for accuracy in accuracies[-1:]]
    if is_number(train, "tokens_per_s"):
        values.append(f"{format_number(train['tokens_per_s'])} tok/s")
    shown = [name for name in VALUES if is_number(train, name)]
    return values + [VALUES[name].format(train[name]) for name in shown]


def is_number(event: Any, name: str) -> bool:
    """True if the event has a finite number of this name."""
    value = event.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def sample_lines(status: RunStatus) -> list[str]:
    """First lines of the newest sample."""
    sample = status.last("sample")
    lines = str(sample.get("text", "")).strip("\n").splitlines()[:MAX_SAMPLE_LINES]
    title = f"sample after step {sample.get('step', 0):,}:"
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def format_time(seconds: int | float) -> str:
    """Local time of a time in seconds since 1970.

    The time zone is part of it, since the run may be on another machine.
    """
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def format_age(since: int | float, now: int | float) -> str:
    """Time since a point in time, in days, or hours, minutes and seconds."""
    seconds = max(now - since, 0.0)
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else format_duration(seconds)
