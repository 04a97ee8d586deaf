"""What a run leaves for people: metrics.jsonl, pictures, report.md.

An event of kind "train" has the loss in nats per token, the learning rate, the norm of
the gradient before clipping, tokens per second since the event before, and of that time
the share, from 0 to 1, that the loop waited for its next batch (input_wait).
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gptjax.errors import ModelError

Event = dict[str, Any]

# Okabe & Ito 2008: told apart by colour-blind readers.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
TRAIN = {"color": BLUE, "marker": "o", "markersize": 3}
VALIDATION = {"color": ORANGE, "linestyle": "-.", "marker": "o", "markersize": 3}

WRITING = threading.Lock()  # a thread that saves writes, too


def write_event(path: Path, kind: str, step: int, **values: Any) -> None:
    """Appends one line to metrics.jsonl; floats keep all their digits."""
    line = json.dumps({"event": kind, "step": step, **values}, ensure_ascii=False)
    with WRITING, path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def cut(path: Path, size: int, kept: str) -> None:
    """Drops what metrics.jsonl has beyond `size` bytes, but for events of one kind."""
    if not path.is_file():
        return
    start = json.dumps({"event": kept})[:-1].encode()
    with WRITING, path.open("r+b") as file:
        file.seek(size)
        lines = [line for line in file.readlines() if line.startswith(start)]
        file.truncate(size)
        file.seek(size)
        file.writelines(lines)


def flush(path: Path) -> None:
    """Makes what was written to metrics.jsonl survive a power cut."""
    with path.open("a", encoding="utf-8") as file:
        os.fsync(file.fileno())


def read_events(path: Path) -> list[Event]:
    """All events of a run, oldest first; a last line cut short by a crash is left out.

    Raises:
        ModelError: another line is not an event.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.append({**event, "event": event["event"], "step": event["step"]})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ModelError(
                f"{path}:{number} is not an event of a run. Restore the file from a "
                "copy, or delete that line."
            ) from error
    return events


def trim_events(path: Path, step: int) -> None:
    """Drops what was written after `step`: a run resumed there writes it again."""
    kept = [event for event in read_events(path) if event["step"] <= step]
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in kept]
    new = path.with_suffix(".partial")
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(path)


def series(
    events: Sequence[Event], kind: str, name: str, split: str | None = None
) -> tuple[list, list]:
    """Steps and values of one number of one kind of event.

    Args:
        events: of a run.
        kind: of event.
        name: of the number.
        split: of the data that it was measured on; an event that names none is of
            "validation", and None takes all.
    """
    found = [
        event
        for event in events
        if event["event"] == kind
        and event.get(name) is not None
        and split in (None, event.get("split", "validation"))
    ]
    return [event["step"] for event in found], [event[name] for event in found]


def loss_figure(events: Sequence[Event], per_step: int, unit: str = "token") -> Figure:
    """Training and validation loss over steps, tokens seen on the second axis.

    Args:
        events: of a run.
        per_step: units in one step.
        unit: what the loss is a mean over, "token" or "example".
    """
    figure, axes = new_figure("step", f"loss (nats per {unit})")
    steps, losses = series(events, "train", "loss")
    axes.plot(steps, losses, color=BLUE, linewidth=1, label="train")
    steps, losses = series(events, "eval", "loss", "validation")
    if losses:
        axes.plot(steps, losses, label="validation", **VALIDATION)
        best = min(range(len(losses)), key=losses.__getitem__)
        note = f"best {losses[best]:.3f}"
        axes.annotate(
            note,
            (steps[best], losses[best]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="right",
            color=ORANGE,
        )
    axes.legend(frameon=False)
    add_seen_axis(axes, per_step, unit)
    return figure


def add_seen_axis(axes: Any, per_step: int, unit: str) -> None:
    """Says above the picture how many units had been seen by each step."""
    seen = axes.secondary_xaxis(
        "top", functions=(lambda step: step * per_step, lambda seen: seen / per_step)
    )
    seen.set_xlabel(f"{unit}s seen")
    seen.xaxis.set_major_formatter(lambda value, _: short(value))


def lr_figure(events: Sequence[Event]) -> Figure:
    """The learning rate that each logged step used, and the gradient norm below."""
    figure = Figure(figsize=(5, 4), dpi=144, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, name, label in (
        (upper, "lr", "learning rate"),
        (lower, "grad_norm", "gradient norm"),
    ):
        axes.plot(*series(events, "train", name), color=BLUE, linewidth=1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    lower.set_xlabel("step")
    return figure


def new_figure(x: str, y: str) -> tuple[Figure, Any]:
    """An empty figure of the one size that all pictures have."""
    figure = Figure(figsize=(5, 3.4), dpi=144, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def write_pictures(folder: Path, tokens_per_step: int) -> None:
    """Draws loss.png and lr.png of the run in `folder` from its metrics.jsonl."""
    events = read_events(folder / "metrics.jsonl")
    loss_figure(events, tokens_per_step).savefig(folder / "loss.png")
    lr_figure(events).savefig(folder / "lr.png")


def write_report(folder: Path, title: str, plan: Sequence[str]) -> None:
    """Writes report.md: the plan, the results, the pictures, the last samples."""
    events = read_events(folder / "metrics.jsonl")
    evals = [e for e in events if e["event"] == "eval"]
    lines = [f"# {title}", "", "```text", *plan, "```", ""]
    if evals:
        known = ("loss", "perplexity", "bits_per_byte")
        names = [name for name in known if evals[-1].get(name) is not None]
        lines += [f"| step | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
        for event in evals:
            cells = [f"{event[name]:.4f}" for name in names]
            lines.append(f"| {event['step']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["![loss](loss.png)", "", "![learning rate](lr.png)", ""]
    samples = [e for e in events if e["event"] == "sample"]
    for event in samples[:1] + samples[1:][-1:]:
        text = event["text"].replace("```", "'''")
        lines += [f"Sample after step {event['step']}:", "", "```text", text, "```", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def short(value: int | float) -> str:
    """A count with three digits and a suffix.

    >>> short(124_439_808), short(950.0), short(0)
    ('124M', '950', '0')
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def duration(seconds: int | float) -> str:
    """A time span for people.

    >>> duration(8040), duration(75), duration(3.2)
    ('2h14m', '1m15s', '3s')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def progress(total: int, event: Event, validation: str, left: float) -> str:
    """The one line per interval; its parts never change their order."""
    parts = [
        f"step {event['step']:>{len(str(total))}}/{total}",
        f"loss {event['loss']:.4f}",
        validation,
        f"lr {event['lr']:.2e}",
        f"|g| {event['grad_norm']:.2f}",
        f"{short(event['tokens_per_s'])} tok/s",
        *([f"mfu {event['mfu']:.1%}"] if "mfu" in event else []),
        f"eta {duration(left)}",
        *([f"{event['skipped']}: step skipped"] if "skipped" in event else []),
    ]
    return " | ".join(parts)
