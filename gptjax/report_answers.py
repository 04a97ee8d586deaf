"""Report of SFT and DPO runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjax import report
from gptjax.report import read_events
from gptjax.template import ChatMessage

MetricRows = Mapping[str, Mapping[str, float]]  # values by metric name, by table row
METRIC_NAMES = ("loss", "response_loss", "exact_match", "token_f1", "rouge_l")
METRIC_NAMES += ("margin", "accuracy", "chosen_reward", "rejected_reward")
SampleRow = tuple[
    Sequence[ChatMessage], str, str
]  # messages, response, reference answer


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
    report.write_figures(run_dir, tokens_per_step)
    events = report.read_events(run_dir / "metrics.jsonl")
    evals = {
        f"{event['step']} {event['split']}": {
            n: event[n] for n in METRIC_NAMES if n in event
        }
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
