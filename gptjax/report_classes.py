"""What a run that trains a classifier leaves for people: more pictures, report.md."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from gptjax.report import (
    TRAIN,
    VALIDATION,
    Event,
    add_seen_axis,
    loss_figure,
    lr_figure,
    new_figure,
    read_events,
    series,
    short,
)
from gptjax.scores import scores

PALE = "#AAAAAA"
NAME_CHARACTERS = 18  # of a class in a picture
TEXT_CHARACTERS = 200  # of a mistake in report.md
MISTAKES = 10  # that report.md shows


class Mistake(NamedTuple):
    """One wrong prediction."""

    text: str
    label: str  # the true one
    predicted: str
    probability: float  # that the model gave to what it predicted


def accuracy_figure(events: Sequence[Event], examples_per_step: int) -> Figure:
    """Accuracy on training and validation examples over steps."""
    figure, axes = new_figure("step", "accuracy")
    for split, style in (("train", TRAIN), ("validation", VALIDATION)):
        steps, values = series(events, "eval", "accuracy", split)
        if values:
            axes.plot(steps, values, label=split, **style)
    if axes.lines:
        axes.legend(frameon=False, loc="lower right")
    add_seen_axis(axes, examples_per_step, "example")
    return figure


def confusion_figure(matrix: Int[np.ndarray, "C C"], names: Sequence[str]) -> Figure:
    """Counts in the cells; the colour is the share of the true class (row)."""
    classes = len(names)
    side = min(max(5.0, 2.6 + 0.42 * classes), 16.0)  # inches
    size = 10 if classes <= 8 else max(4, 8 - classes // 20)  # points
    figure = Figure(figsize=(side, side * 0.86), dpi=144, layout="constrained")
    axes = figure.subplots()
    share_CC = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    plain = {"parse_math": False, "fontsize": size}  # a name may hold $
    labels = [short_name(name) for name in names]
    crowded = classes * max(map(len, labels)) > 32
    axes.set_xticks(range(classes), labels, rotation=90 if crowded else 0, **plain)
    axes.set_yticks(range(classes), labels, **plain)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if share_CC[row, column] > 0.5 else "black" if count else PALE
        text = str(count) if count < 10_000 else short(int(count))
        axes.text(
            column, row, text, color=color, fontsize=size, ha="center", va="center"
        )
    bar = figure.colorbar(image, shrink=0.8, label="share of the true class")
    bar.outline.set_visible(False)
    return figure


def write_classification(
    folder: Path,
    *,
    plan: Sequence[str],
    result: str,
    matrix: Int[np.ndarray, "C C"],
    names: Sequence[str],
    mistakes: Sequence[Mistake],
    examples_per_step: int,
) -> None:
    """Writes report.md and all pictures of the run in `folder`.

    Args:
        folder: of a run, with metrics.jsonl.
        plan: lines that said what would happen.
        result: one line.
        matrix: from `gptjax.scores.confusion`.
        names: of the classes.
        mistakes: in any order; those that the model was surest of are shown.
        examples_per_step: for the axis of examples seen.
    """
    events = read_events(folder / "metrics.jsonl")
    figures = {
        "accuracy": accuracy_figure(events, examples_per_step),
        "confusion": confusion_figure(matrix, names),
        "loss": loss_figure(events, examples_per_step, "example"),
        "lr": lr_figure(events),
    }
    with warnings.catch_warnings():  # a name may be in a script that the font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")

    lines = [f"# Run {folder.name}", "", "```text", *plan, "```", "", result, ""]
    lines += class_table(matrix, names)
    for name in figures:
        lines += ["", f"![{name}]({name}.png)"]
    if mistakes:
        lines += ["", "Wrong predictions that the model was surest of:", ""]
    for wrong in sorted(mistakes, key=lambda wrong: -wrong.probability)[:MISTAKES]:
        taken = f"{code(wrong.label)} taken for {code(wrong.predicted)}"
        lines.append(f"- {taken} ({wrong.probability:.3f}): {code(wrong.text)}")
    (folder / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def class_table(matrix: Int[np.ndarray, "C C"], names: Sequence[str]) -> list[str]:
    """Precision, recall, F1 and count of each class, as lines of Markdown."""
    s = scores(matrix)
    lines = ["| class | precision | recall | F1 | count |", "|---|" + "---:|" * 4]
    rows = zip(names, s.precision, s.recall, s.f1, s.count, strict=True)
    for name, precision, recall, f1, count in rows:
        # Readers of Markdown disagree about how to escape a bar inside a cell.
        cell = code(name).replace("|", "¦")
        lines.append(
            f"| {cell} | {precision:.4f} | {recall:.4f} | {f1:.4f} | {count:,} |"
        )
    return lines


def cut(text: str, most: int) -> str:
    r"""At most so many characters, on one line, all of them visible.

    >>> cut("one\ntwo three", 8)
    'one two…'
    """
    visible = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(visible.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def short_name(name: str) -> str:
    """A name for a picture; both ends stay, as names of classes often begin alike.

    >>> short_name("comp.sys.ibm.pc.hardware")
    'comp.sys.…hardware'
    """
    line, half = cut(name, 10 * NAME_CHARACTERS), NAME_CHARACTERS // 2
    if len(line) <= NAME_CHARACTERS:
        return line
    return f"{line[:half]}…{line[1 - half :]}"


def code(text: str) -> str:
    """The text as a code span of Markdown, in which no markup works.

    >>> print(code("<b>`x`"))
    `` <b>`x` ``
    """
    line = cut(text, TEXT_CHARACTERS)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if "`" in line or not line else ""
    return f"{fence}{room}{line}{room}{fence}"
