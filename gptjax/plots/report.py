"""Reports of runs: report.md with its tables, samples and figures."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from gptjax.evaluation.metrics import classification_metrics
from gptjax.plots.curves import (
    TRAIN_STYLE,
    VALIDATION_STYLE,
    add_tokens_axis,
    loss_figure,
    lr_figure,
    new_figure,
    write_figures,
)
from gptjax.tokenizer.template_worker import ChatMessage
from gptjax.training.metrics import Event, format_number, metric_series, read_events

MetricRows = Mapping[str, Mapping[str, float]]  # values by metric name, by table row
METRIC_NAMES = ("loss", "response_loss", "exact_match", "token_f1", "rouge_l")
METRIC_NAMES += ("margin", "accuracy", "chosen_reward", "rejected_reward")
ZERO_COUNT_COLOR = "#AAAAAA"  # of empty cells in a confusion matrix
MAX_NAME_CHARS = 18  # of a class name in a plot
MAX_TEXT_CHARS = 200  # of a misclassified text in report.md
MAX_MISTAKES = 10  # listed in report.md

# Messages, response, reference answer.
SampleRow = tuple[Sequence[ChatMessage], str, str]


def write_samples(
    run_dir: Path,
    *,
    summary: Sequence[str],
    result: str,
    tokens_per_step: int,
    task_scores: MetricRows | None = None,
    samples: Sequence[SampleRow] = (),
) -> None:
    """Writes the plots and report.md of a run.

    `summary` holds the lines printed before training, `result` describes the outcome.
    `tokens_per_step` is the mean over batches, `task_scores` maps tasks to scores.
    """
    write_figures(run_dir, tokens_per_step)
    events = read_events(run_dir / "metrics.jsonl")
    evals = {
        f"{event['step']} {event['split']}": {n: event[n] for n in METRIC_NAMES if n in event}
        for event in events
        if event["event"] == "eval"
    }
    lines = [f"# Run {run_dir.name}", "", "```text", *summary, "```", ""]
    lines += [result[:1].upper() + result[1:] + ".", ""]
    lines += markdown_table("task", task_scores or {}) + markdown_table("step", evals)
    lines += ["![loss](loss.png)", "", "![learning rate](lr.png)", ""]
    for messages, response, reference in samples:
        prompt = [messages[-2]["content"], messages[-2].get("input", "")]
        parts = [*filter(None, prompt), f"answer: {response}", f"wanted: {reference}"]
        text = "\n".join(parts).replace("```", "'''")
        lines += ["```text", text, "```", ""]
    (run_dir / "report.md").write_text("\n".join(lines), encoding="utf-8")


def markdown_table(title: str, rows: MetricRows) -> list[str]:
    """Formats a Markdown table of numbers; returns no lines if there are no rows."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    lines = [f"| {title} | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    for row, numbers in rows.items():
        cells = [f"{numbers[name]:.4f}" if name in numbers else "" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, ""]


def write_report(run_dir: Path, title: str, summary: Sequence[str]) -> None:
    """Writes report.md: summary, results, figures, first and last sample."""
    events = read_events(run_dir / "metrics.jsonl")
    evals = [e for e in events if e["event"] == "eval"]
    lines = [f"# {title}", "", "```text", *summary, "```", ""]
    if evals:
        metric_names = ("loss", "perplexity", "bits_per_byte")
        names = [name for name in metric_names if evals[-1].get(name) is not None]
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
    (run_dir / "report.md").write_text("\n".join(lines), encoding="utf-8")


class Misclassification(NamedTuple):
    """One wrong prediction."""

    text: str
    label: str  # true class
    predicted: str
    probability: float  # of the predicted class


def accuracy_figure(events: Sequence[Event], examples_per_step: int) -> Figure:
    """Plots training and validation accuracy over steps."""
    figure, axes = new_figure("step", "accuracy")
    for split, style in (("train", TRAIN_STYLE), ("validation", VALIDATION_STYLE)):
        steps, values = metric_series(events, "eval", "accuracy", split)
        if values:
            axes.plot(steps, values, label=split, **style)
    if axes.lines:
        axes.legend(frameon=False, loc="lower right")
    add_tokens_axis(axes, examples_per_step, "example")
    return figure


def confusion_figure(confusion_CC: Int[np.ndarray, "C C"], class_names: Sequence[str]) -> Figure:
    """Plots a confusion matrix; color is the fraction of the true class (row)."""
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
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (row, column), count in np.ndenumerate(confusion_CC):
        color = "black" if count else ZERO_COUNT_COLOR
        if share_CC[row, column] > 0.5:
            color = "white"
        text = str(count) if count < 10_000 else format_number(int(count))
        axes.text(column, row, text, color=color, fontsize=size, ha="center", va="center")
    bar = figure.colorbar(image, shrink=0.8, label="share of the true class")
    bar.outline.set_visible(False)
    return figure


def write_classification_report(
    run_dir: Path,
    *,
    summary: Sequence[str],
    result: str,
    confusion_CC: Int[np.ndarray, "C C"],
    class_names: Sequence[str],
    mistakes: Sequence[Misclassification],
    examples_per_step: int,
) -> None:
    """Writes report.md and all plots of a run.

    `summary` holds the lines printed before training, `result` is one line. The report
    lists the most confident of the `mistakes`, which may have any order.
    """
    events = read_events(run_dir / "metrics.jsonl")
    figures = {
        "accuracy": accuracy_figure(events, examples_per_step),
        "confusion": confusion_figure(confusion_CC, class_names),
        "loss": loss_figure(events, examples_per_step, "example"),
        "lr": lr_figure(events),
    }
    with warnings.catch_warnings():  # the font may lack the script of a name
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        for name, figure in figures.items():
            figure.savefig(run_dir / f"{name}.png")

    lines = [f"# Run {run_dir.name}", "", "```text", *summary, "```", "", result, ""]
    lines += per_class_table(confusion_CC, class_names)
    for name in figures:
        lines += ["", f"![{name}]({name}.png)"]
    if mistakes:
        lines += ["", "Most confident misclassifications:", ""]
    for mistake in sorted(mistakes, key=lambda wrong: -wrong.probability)[:MAX_MISTAKES]:
        lines.append(
            f"- {inline_code(mistake.label)} predicted as "
            f"{inline_code(mistake.predicted)} ({mistake.probability:.3f}): "
            f"{inline_code(mistake.text)}"
        )
    (run_dir / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def per_class_table(confusion_CC: Int[np.ndarray, "C C"], class_names: Sequence[str]) -> list[str]:
    """Formats precision, recall, F1 and count per class as a Markdown table."""
    metrics = classification_metrics(confusion_CC)
    lines = ["| class | precision | recall | F1 | count |", "|---|" + "---:|" * 4]
    rows = zip(
        class_names, metrics.precision, metrics.recall, metrics.f1, metrics.count, strict=True
    )
    for name, precision, recall, f1, count in rows:
        # Markdown renderers disagree on how to escape a bar inside a cell.
        cell = inline_code(name).replace("|", "¦")
        lines.append(f"| {cell} | {precision:.4f} | {recall:.4f} | {f1:.4f} | {count:,} |")
    return lines


def shorten_cell(text: str, max_length: int) -> str:
    r"""Converts text to one printable line of limited length.

    >>> shorten_cell("one\ntwo three", 8)
    'one two…'
    """
    visible = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(visible.split())
    return line if len(line) <= max_length else line[: max_length - 1].rstrip() + "…"


def abbreviate(name: str) -> str:
    """Shortens a class name for a plot; keeps both ends, as prefixes are often shared.

    >>> abbreviate("comp.sys.ibm.pc.hardware")
    'comp.sys.…hardware'
    """
    line, half = shorten_cell(name, 10 * MAX_NAME_CHARS), MAX_NAME_CHARS // 2
    if len(line) <= MAX_NAME_CHARS:
        return line
    return f"{line[:half]}…{line[1 - half :]}"


def inline_code(text: str) -> str:
    """Formats text as a Markdown code span, in which no markup is interpreted.

    >>> print(inline_code("<b>`x`"))
    `` <b>`x` ``
    """
    line = shorten_cell(text, MAX_TEXT_CHARS)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if "`" in line or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"
