"""Figure of several runs: their loss curves over one axis."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from gptjax.evaluation.run_comparison import PER_BYTE, CurveAxis, RunRecord, common_unit
from gptjax.plots.curves import BLUE, ORANGE, abbreviate, add_legend, new_figure
from gptjax.training.metrics import format_number, metric_series

# Okabe & Ito 2008, without yellow and black: distinguishable with color blindness.
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINE_STYLES = ("-", "--", ":")  # after the last color they begin anew
AXIS_LABELS = {
    "steps": "step",
    "tokens": "training tokens",
    "seconds": "training time (seconds)",
    "flops": "training FLOPs",
}


def comparison_figure(groups: Sequence[Sequence[RunRecord]], axis: CurveAxis) -> Figure:
    """Training and validation losses of runs; seeds of a config share a color.

    If the tokenizers differ, it shows the bits per byte of the validation, since losses
    per token cannot be compared.
    """
    first = groups[0][0]
    units = [common_unit(first, run) for runs in groups for run in runs]
    unit = PER_BYTE if PER_BYTE in units else units[0]
    figure, axes = new_figure(AXIS_LABELS[axis], f"loss ({unit.name})")
    for number, runs in enumerate(groups):
        style = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)],
        }
        for run in runs:
            label = group_label(runs) if run is runs[0] else None
            draw_run(axes, run, axis, unit.metric, label, style)
    axes.xaxis.set_major_formatter(lambda value, _: format_number(value))
    if unit != PER_BYTE:
        axes.plot([], [], color="black", linewidth=0.8, alpha=0.4, label="training")
    axes.plot([], [], color="black", marker="o", markersize=4, label="validation")
    add_legend(figure)
    return figure


def draw_run(
    axes: Any, run: RunRecord, axis: CurveAxis, metric: str, label: str | None, style: Any
) -> None:
    """Draws the validation losses of a run, and its training losses unless per byte.

    Those before the first step are left out, since they would determine the scale.
    """
    if metric != PER_BYTE.metric:
        steps, losses = metric_series(run.events, "train", metric)
        axes.plot(run.along(axis, steps), losses, linewidth=0.8, alpha=0.4, **style)
    trained = [event for event in run.events if event["step"] > 0]
    steps, losses = metric_series(trained, "eval", metric, "validation")
    axes.plot(run.along(axis, steps), losses, marker="o", markersize=4, label=label, **style)


def group_label(runs: Sequence[RunRecord]) -> str:
    """Name of the first run of a config, and its number of seeds."""
    name = abbreviate(runs[0].name).replace("$", r"\$")
    return f"{name}, {len(runs)} seeds" if len(runs) > 1 else name
