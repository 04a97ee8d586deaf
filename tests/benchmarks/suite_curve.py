"""Draws the scores of the small suite against training steps, and prints them.

    gptjax train quickstart --run RUN --checkpoint.every 50 --checkpoint.keep 1000
    python tests/benchmarks/suite_curve.py RUN PICTURE.png

Evaluates every checkpoint that RUN keeps.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import gptjax
from gptjax.checkpoint.retention import list_steps
from gptjax.evaluation.small_suite import TaskScore, evaluate_suite
from gptjax.plots.curves import BLUE, GREY


def suite_figure(scores: dict[int, dict[str, TaskScore]]) -> Figure:
    """One panel for each task; the dotted line is chance."""
    figure = Figure(figsize=(7.5, 4.2), dpi=144, layout="constrained")
    steps, tasks = list(scores), next(iter(scores.values()))
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for axes, (name, first) in zip(panels, tasks.items(), strict=True):
        accuracy = [scores[step][name].accuracy for step in steps]
        error = [scores[step][name].standard_error for step in steps]
        axes.errorbar(steps, accuracy, error, color=BLUE, marker="o", markersize=3, elinewidth=0.8)
        axes.axhline(first.chance, color=GREY, linestyle=":")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.03)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    return figure


def main() -> None:
    run, picture = map(Path, sys.argv[1:])
    scores = {}
    for step in list_steps(run / "checkpoints"):
        scores[step] = evaluate_suite(gptjax.load(run / "checkpoints" / str(step)))
        print(step, *(f"{name} {x.accuracy:.3f}" for name, x in scores[step].items()), flush=True)
    suite_figure(scores).savefig(picture)


if __name__ == "__main__":
    main()
