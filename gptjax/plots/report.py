"""Report of a run: report.md with its results, figures and samples."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from gptjax.evaluation.metrics import classification_metrics
from gptjax.fileio.atomic import atomic_path, write_atomic
from gptjax.plots.curves import loss_figure, lr_figure, single_line
from gptjax.plots.token_boxes import shorten_label
from gptjax.runtime.terminal import sanitize
from gptjax.training.metrics import read_events

# Values by metric name, by table row.
MetricRows = Mapping[str, Mapping[str, float | str]]
METRIC_NAMES = ("loss", "perplexity", "bits_per_byte", "response_loss", "exact_match", "token_f1")
METRIC_NAMES += ("rouge_l", "margin", "accuracy", "chosen_reward", "rejected_reward")
MAX_TEXT_CHARS = 200  # of a misclassified text
MAX_MISTAKES = 10


class Misclassification(NamedTuple):
    """One wrong prediction."""

    text: str
    label: str  # true class
    predicted: str
    probability: float  # of the predicted class


def write_report(
    run_dir: Path,
    *,
    summary: Sequence[str],
    result: str,
    units_per_step: int | float,
    unit: str = "token",
    auxiliary_loss: str = "",
    figures: Mapping[str, Figure] | None = None,
    details: Sequence[str] = (),
) -> None:
    """Writes report.md and the figures of a run, from its metrics.jsonl.

    `summary` are the lines printed before training, `result` is the outcome in one
    sentence; the loss is averaged over `unit`, of which a step has `units_per_step`;
    `auxiliary_loss` is that of `loss_figure`. `details` are lines of tables and samples
    of the task.
    """
    events = read_events(run_dir / "metrics.jsonl")
    loss = loss_figure(events, units_per_step, unit, auxiliary_loss)
    pictures = {"loss": loss, "lr": lr_figure(events), **(figures or {})}
    with warnings.catch_warnings():  # the font may lack the script of a class name
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        for name, figure in pictures.items():
            with atomic_path(run_dir / f"{name}.png") as new:
                figure.savefig(new, format="png")
    evaluations = {
        f"{event['step']} {event.get('split', 'validation')}": {
            name: event[name] for name in METRIC_NAMES if event.get(name) is not None
        }
        for event in events
        if event["event"] == "eval"
    }
    lines = [f"# Run {run_dir.name}", "", *code_block("\n".join(summary))]
    lines += [f"{result[:1].upper()}{result[1:]}.", "", *markdown_table("step", evaluations)]
    for name in pictures:
        lines += [f"![{name}]({name}.png)", ""]
    samples = [event for event in events if event["event"] == "sample"]
    for event in samples[:1] + samples[1:][-1:]:
        lines += [f"Sample after step {event['step']}:", "", *code_block(event["text"])]
    write_atomic(run_dir / "report.md", sanitize("\n".join([*lines, *details])))


def markdown_table(title: str, rows: MetricRows) -> list[str]:
    """Formats a Markdown table; returns no lines if there are no rows.

    >>> markdown_table("step", {"20": {"loss": 0.5}, "40": {"loss": 0.5, "n": 3}})[2:]
    ['| 20 | 0.5000 |  |', '| 40 | 0.5000 | 3 |', '']
    """
    if not rows:
        return []
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    lines = [f"| {title} | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    for row, numbers in rows.items():
        values = [numbers.get(name, "") for name in names]
        cells = [f"{x:.4f}" if isinstance(x, float) else f"{x}" for x in values]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, ""]


def per_class_table(confusion_CC: Int[np.ndarray, "C C"], class_names: Sequence[str]) -> list[str]:
    """Formats precision, recall, F1 and count per class as a Markdown table."""
    m = classification_metrics(confusion_CC)
    rows = {}
    for n, name in enumerate(class_names):
        values = {"precision": m.precision[n], "recall": m.recall[n], "F1": m.f1[n]}
        rows[code_cell(name)] = values | {"count": m.count[n]}
    return markdown_table("class", rows)


def list_mistakes(mistakes: Iterable[Misclassification]) -> list[str]:
    """Lists the most confident misclassifications, if there are any."""
    worst = sorted(mistakes, key=lambda wrong: -wrong.probability)[:MAX_MISTAKES]
    lines = [
        f"- {inline_code(wrong.label)} predicted as {inline_code(wrong.predicted)} "
        f"({wrong.probability:.3f}): {inline_code(wrong.text)}"
        for wrong in worst
    ]
    return ["Most confident misclassifications:", "", *lines, ""] if lines else []


def code_block(text: str) -> list[str]:
    """Formats text as a Markdown code block, which the text cannot end."""
    return ["```text", text.replace("```", "'''"), "```", ""]


def inline_code(text: str) -> str:
    """Formats text as a Markdown code span, in which no markup is interpreted.

    >>> print(inline_code("<b>`x`"))
    `` <b>`x` ``
    """
    line = shorten_label(single_line(text), MAX_TEXT_CHARS)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if "`" in line or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_cell(text: str) -> str:
    """Formats text as a code span in a cell of a table.

    Markdown renderers disagree on how to escape a bar inside a cell.
    """
    return inline_code(text).replace("|", "¦")
