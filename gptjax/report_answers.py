"""What a run that learns from answers leaves for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjax import report
from gptjax.template import Message

Rows = Mapping[str, Mapping[str, float]]  # numbers by name, for each row of a table
NAMES = ("loss", "response_loss", "exact_match", "token_f1", "rouge_l")
NAMES += ("margin", "accuracy", "chosen_reward", "rejected_reward")
Shown = tuple[Sequence[Message], str, str]  # messages, the answer, that of the data


def write_answers(
    folder: Path,
    *,
    plan: Sequence[str],
    result: str,
    tokens_per_step: int,
    tasks: Rows | None = None,
    answers: Sequence[Shown] = (),
) -> None:
    """Writes the pictures and report.md of the run in `folder`.

    Args:
        folder: of the run, with its metrics.jsonl.
        plan: what was to happen.
        result: how it went.
        tokens_per_step: of a mean batch.
        tasks: scores of each task, where the data name tasks.
        answers: some to be shown.
    """
    report.write_pictures(folder, tokens_per_step)
    events = report.read_events(folder / "metrics.jsonl")
    evals = {
        f"{event['step']} {event['split']}": {n: event[n] for n in NAMES if n in event}
        for event in events
        if event["event"] == "eval"
    }
    lines = [f"# Run {folder.name}", "", "```text", *plan, "```", ""]
    lines += [result[:1].upper() + result[1:] + ".", ""]
    lines += table("task", tasks or {}) + table("step", evals)
    lines += ["![loss](loss.png)", "", "![learning rate](lr.png)", ""]
    for messages, response, reference in answers:
        asked = [messages[-2]["content"], messages[-2].get("input", "")]
        said = [*filter(None, asked), f"answer: {response}", f"wanted: {reference}"]
        text = "\n".join(said).replace("```", "'''")
        lines += ["```text", text, "```", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def table(title: str, rows: Rows) -> list[str]:
    """Lines of a Markdown table of numbers; none where there are no rows."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    lines = [f"| {title} | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    for row, numbers in rows.items():
        cells = [f"{numbers[name]:.4f}" if name in numbers else "" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, ""]
