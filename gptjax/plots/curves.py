"""Loss and learning-rate curves of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gptjax.training.metrics import Event, format_number, metric_series, read_events

# Okabe & Ito 2008: distinguishable with color blindness.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
TRAIN_STYLE = {"color": BLUE, "marker": "o", "markersize": 3}
VALIDATION_STYLE = {"color": ORANGE, "linestyle": "-.", "marker": "o", "markersize": 3}


def loss_figure(events: Sequence[Event], units_per_step: int, unit: str = "token") -> Figure:
    """Training and validation loss over steps, with tokens seen as a second axis.

    Args:
        events: of a run.
        units_per_step: units per step.
        unit: unit that the loss is averaged over, "token" or "example".
    """
    figure, axes = new_figure("step", f"loss (nats per {unit})")
    steps, losses = metric_series(events, "train", "loss")
    axes.plot(steps, losses, color=BLUE, linewidth=1, label="train")
    steps, losses = metric_series(events, "eval", "loss", "validation")
    if losses:
        axes.plot(steps, losses, label="validation", **VALIDATION_STYLE)
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
    add_tokens_axis(axes, units_per_step, unit)
    return figure


def add_tokens_axis(axes: Any, units_per_step: int, unit: str) -> None:
    """Adds a top axis with the number of units seen."""
    top_axis = axes.secondary_xaxis(
        "top", functions=(lambda step: step * units_per_step, lambda seen: seen / units_per_step)
    )
    top_axis.set_xlabel(f"{unit}s seen")
    top_axis.xaxis.set_major_formatter(lambda value, _: format_number(value))


def lr_figure(events: Sequence[Event]) -> Figure:
    """Learning rate and gradient norm of the logged steps."""
    figure = Figure(figsize=(5, 4), dpi=144, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, name, label in (
        (upper, "lr", "learning rate"),
        (lower, "grad_norm", "gradient norm"),
    ):
        axes.plot(*metric_series(events, "train", name), color=BLUE, linewidth=1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    lower.set_xlabel("step")
    return figure


def new_figure(x: str, y: str) -> tuple[Figure, Any]:
    """Empty figure of the standard size, with its axes."""
    figure = Figure(figsize=(5, 3.4), dpi=144, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def write_figures(run_dir: Path, tokens_per_step: int) -> None:
    """Writes loss.png and lr.png of a run from its metrics.jsonl."""
    events = read_events(run_dir / "metrics.jsonl")
    loss_figure(events, tokens_per_step).savefig(run_dir / "loss.png")
    lr_figure(events).savefig(run_dir / "lr.png")
