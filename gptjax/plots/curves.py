"""Figures of a run: loss, learning rate, accuracy and confusion matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from gptjax.training.metrics import Event, format_number, metric_series

# Okabe & Ito 2008: distinguishable with color blindness.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
TRAIN_STYLE = {"color": BLUE, "marker": "o", "markersize": 3}
VALIDATION_STYLE = {"color": ORANGE, "linestyle": "-.", "marker": "o", "markersize": 3}
MAX_NAME_CHARS = 18  # of a class name


def new_figure(x: str, y: str) -> tuple[Figure, Any]:
    """Empty figure of the standard size, with its axes."""
    figure, (axes,) = new_panels(x, y)
    return figure, axes


def new_panels(x: str, *y: str) -> tuple[Figure, list[Any]]:
    """Empty figure with one panel for each label in `y`, and their axes."""
    figure = Figure(figsize=(5, 2.2 + 1.4 * len(y)), dpi=144, layout="constrained")
    panels = [*figure.subplots(len(y), sharex=True, squeeze=False)[:, 0]]
    for axes, label in zip(panels, y, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(x)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure, panels


def add_legend(figure: Figure) -> None:
    """Adds a legend below the axes, where it hides no curve."""
    if any(axes.lines for axes in figure.axes):
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def add_units_axis(axes: Any, units_per_step: int | float, unit: str) -> None:
    """Adds a top axis with the number of units seen."""
    functions = (lambda step: step * units_per_step, lambda seen: seen / units_per_step)
    top_axis = axes.secondary_xaxis("top", functions=functions)
    top_axis.set_xlabel(f"{unit}s seen")
    top_axis.xaxis.set_major_formatter(lambda value, _: format_number(value))


def loss_figure(
    events: Sequence[Event],
    units_per_step: int | float,
    unit: str = "token",
    auxiliary_loss: str = "",
) -> Figure:
    """Training and validation loss over steps, with units seen as a second axis.

    `unit` is what the loss is averaged over, "token", "example" or "pair". If the
    training loss includes an `auxiliary_loss`, it has a panel of its own, and the
    validation loss is compared with that of training rows.
    """
    labels = [f"loss (nats per {unit})", *[f"with {auxiliary_loss}"] * bool(auxiliary_loss)]
    figure, panels = new_panels("step", *labels)
    panels[-1].plot(*metric_series(events, "train", "loss"), color=BLUE, linewidth=1, label="train")
    if auxiliary_loss:
        steps, losses = metric_series(events, "eval", "loss", "train")
        panels[0].plot(steps, losses, label="training rows", **TRAIN_STYLE)
    steps, losses = metric_series(events, "eval", "loss", "validation")
    if losses:
        label = f"validation, best {min(losses):.3f}"
        panels[0].plot(steps, losses, label=label, **VALIDATION_STYLE)
    add_legend(figure)
    add_units_axis(panels[0], units_per_step, unit)
    return figure


def lr_figure(events: Sequence[Event]) -> Figure:
    """Learning rate and gradient norm of the logged steps."""
    figure, panels = new_panels("step", "learning rate", "gradient norm")
    for axes, name in zip(panels, ("lr", "grad_norm"), strict=True):
        axes.plot(*metric_series(events, "train", name), color=BLUE, linewidth=1)
    return figure


def accuracy_figure(events: Sequence[Event], examples_per_step: int | float) -> Figure:
    """Training and validation accuracy over steps."""
    figure, axes = new_figure("step", "accuracy")
    for split, style in (("train", TRAIN_STYLE), ("validation", VALIDATION_STYLE)):
        steps, values = metric_series(events, "eval", "accuracy", split)
        if values:
            axes.plot(steps, values, label=split, **style)
    add_legend(figure)
    add_units_axis(axes, examples_per_step, "example")
    return figure


def confusion_figure(confusion_CC: Int[np.ndarray, "C C"], class_names: Sequence[str]) -> Figure:
    """Confusion matrix; color is the fraction of the true class (row)."""
    classes = len(class_names)
    side = min(max(5.0, 2.6 + 0.42 * classes), 16.0)  # inches
    size = 10 if classes <= 8 else max(4, 8 - classes // 20)  # points
    figure = Figure(figsize=(side, side * 0.86), dpi=144, layout="constrained")
    axes = figure.subplots()
    share_CC = confusion_CC / np.maximum(confusion_CC.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    text_style = {"parse_math": False, "fontsize": size}  # a name may contain $
    labels = [abbreviate(name) for name in class_names]
    crowded = classes * max(map(len, labels)) > 32
    axes.set_xticks(range(classes), labels, rotation=90 if crowded else 0, **text_style)
    axes.set_yticks(range(classes), labels, **text_style)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(confusion_CC):
        color = "white" if share_CC[row, column] > 0.5 else "black"
        text = str(count) if count < 10_000 else format_number(int(count))
        axes.text(column, row, text, color=color, fontsize=size, ha="center", va="center")
    figure.colorbar(image, shrink=0.8, label="share of the true class").outline.set_visible(False)
    return figure


def abbreviate(name: str) -> str:
    """Shortens a class name for a plot; keeps both ends, as prefixes are often shared.

    >>> abbreviate("comp.sys.ibm.pc.hardware")
    'comp.sys.…hardware'
    """
    line, half = single_line(name), MAX_NAME_CHARS // 2
    return line if len(line) <= MAX_NAME_CHARS else f"{line[:half]}…{line[1 - half :]}"


def single_line(text: str) -> str:
    r"""Converts text to one printable line.

    >>> single_line("one\ntwo  three\x1b")
    'one two three'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
