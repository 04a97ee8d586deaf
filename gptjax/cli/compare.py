"""The tables and sentences of `gptjax compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjax.errors import GptjaxError, ModelError
from gptjax.evaluation.comparison import MIN_EFFECTIVE_COUNT, MIN_SEEDS, Interval
from gptjax.evaluation.run_comparison import (
    CurveAxis,
    ModelComparison,
    RunRecord,
    changed_options,
    common_unit,
    compare_configs,
    compare_models,
    group_seeds,
    has_same_validation,
    held_out_documents,
    read_text_documents,
)
from gptjax.fileio.atomic import atomic_path
from gptjax.plots.comparison import comparison_figure
from gptjax.plots.report import code_cell, markdown_table
from gptjax.runtime.terminal import logger
from gptjax.runtime.timing import format_duration
from gptjax.training.estimate import parameter_count
from gptjax.training.metrics import best_validation, format_number, metric_series
from gptjax.weights.load import load

Table = Mapping[str, Mapping[str, str]]  # cells by column, by row


def format_runs(runs: Sequence[RunRecord]) -> Table:
    """Size, effort and best validation of each run."""
    return {run.name: describe_run(run) for run in runs}


def describe_run(run: RunRecord) -> dict[str, str]:
    """Cells of one run; without those that its events do not have."""
    steps, total = run.step, run.config.train.steps
    tokens, seconds = float(run.along("tokens", [steps])[0]), float(run.seconds_at([steps])[0])
    cells = {
        "parameters": f"{parameter_count(run.config.model):,}",
        "steps": f"{steps:,}" if steps >= total else f"{steps:,} of {total:,}",
    }
    if tokens == tokens:
        cells["tokens"] = format_number(tokens)
    if seconds > 0:
        cells |= {"time": format_duration(seconds), "tokens/s": format_number(tokens / seconds)}
    if best := best_validation(run.events):
        cells |= {"validation loss": f"{best[1]:.4f}", "at step": f"{best[0]:,}"}
    for name, column in (("bits_per_byte", "bits/byte"), ("accuracy", "accuracy")):
        values = metric_series(run.events, "eval", name, "validation")[1]
        best_value = max if name == "accuracy" else min
        cells |= {column: f"{best_value(values):.4f}"} if values else {}
    return cells


def format_changes(runs: Sequence[RunRecord]) -> Table:
    """Options that differ, with their value in each run."""
    return {
        option: {run.name: str(value) for run, value in zip(runs, values, strict=True)}
        for option, values in changed_options(runs).items()
    }


def format_table(title: str, rows: Table, *, markdown: bool) -> list[str]:
    """Formats a table as aligned text or as Markdown."""
    if markdown:
        cells = {
            code_cell(row): {
                name: code_cell(x) if title == "option" else x for name, x in v.items()
            }
            for row, v in rows.items()
        }
        return markdown_table(title, cells)
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = [[title, *names]]
    lines += [[row, *(cells.get(name, "") for name in names)] for row, cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ] + [""]


def compare_groups(runs: Sequence[RunRecord]) -> list[str]:
    """Sentences about the configs: the first with each other one, by their seeds."""
    groups = group_seeds(runs)
    if len(groups) == 1:
        return [
            f"All {len(runs)} runs are seeds of one config, so the models differ by their seeds."
        ]
    return [compare_two_groups(groups[0], other) for other in groups[1:]]


def compare_two_groups(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> str:
    """Compares two configs by the final validation losses of their seeds."""
    names = f"config of {second[0].name} - config of {first[0].name}"
    unit = common_unit(first[0], second[0])
    if not all(has_same_validation(first[0], run) for run in [*first[1:], *second]):
        return f"{names}: not compared, since they were validated on different data."
    complete = [[run for run in group if run.is_finished] for group in (first, second)]
    counts = [len(group) for group in complete]
    if min(counts) < MIN_SEEDS:
        seeds = " and ".join(f"{count} finished seed{'s' * (count != 1)}" for count in counts)
        return (
            f"{names}: {seeds}, so the effects of seed and config cannot be told apart. Train at "
            f"least {MIN_SEEDS} of each (--train.seed)."
        )
    if any(run.final_evaluation.get(unit.metric) is None for group in complete for run in group):
        return f"{names}: not compared, since their tokenizers differ and they log no {unit.name}."
    interval = compare_configs(*complete)
    return (
        f"{names}: {format_interval(interval, unit.name)}, over {counts[1]} and {counts[0]} "
        f"seeds (Welch): {judge(interval, second[0].name, 'config', 'seeds')}"
    )


def format_interval(interval: Interval, unit: str) -> str:
    """Formats a difference with its interval."""
    difference, low, high = interval
    return f"{difference:+.4f} {unit}, 95% interval {low:+.4f} to {high:+.4f}"


def judge(interval: Interval, name: str, kind: str, evidence: str) -> str:
    """Says in words whether the named model or config is better."""
    if not interval.excludes_zero:
        return f"no difference is established by these {evidence}."
    return f"the {kind} of {name} is {'better' if interval.high < 0 else 'worse'}."


def compare_run_models(runs: Sequence[RunRecord], text: Path | None, max_bytes: int) -> list[str]:
    """Sentences about the models: that of the first run with that of each other one."""
    if text is not None:
        documents, others = read_text_documents(text, max_bytes), list(runs[1:])
        lines = []
    else:
        others = [run for run in runs[1:] if has_same_validation(runs[0], run)]
        lines = [
            f"model of {run.name}: not compared, since it was validated on other data than "
            f"{runs[0].name}. Give --text FILE."
            for run in runs[1:]
            if run not in others
        ]
        documents = held_out_documents(runs[0], max_bytes) if others else None
        if others and documents is None:
            return [
                f"models: not compared, since {runs[0].name} has no held-out text. Give --text."
            ]
    if not others or documents is None:
        return lines
    logger.info(f"scoring  {len(documents):,} documents with {len(others) + 1} models")
    try:
        results = compare_models(
            load(runs[0].run_dir), [lambda run=run: load(run.run_dir) for run in others], documents
        )
    except ModelError as error:  # such as a classifier, or a run without a checkpoint
        return [*lines, f"models: not compared: {GptjaxError(error)}"]
    pairs = zip(others, results, strict=True)
    return lines + [describe_models(runs[0].name, run.name, result) for run, result in pairs]


def describe_models(first: str, second: str, result: ModelComparison) -> str:
    """Sentence about two models."""
    kind, clusters = "documents", f"{result.num_documents:,} documents"
    if not result.is_by_document:
        kind, clusters = "blocks", f"{result.num_clusters} blocks of a text in too few documents"
    interval, warning = format_interval(result.interval, result.unit.name), ""
    enough = min(MIN_EFFECTIVE_COUNT, result.num_documents / 2)
    if result.is_by_document and result.effective_count < enough:
        warning = (
            f" A few long documents dominate, so that they count as {result.effective_count:.0f} "
            "equal ones: the interval may be too narrow. Give a --text of more documents."
        )
    return (
        f"model of {second} - model of {first}: {interval} "
        f"({result.losses[1]:.4f} - {result.losses[0]:.4f}), over {clusters} with "
        f"{result.num_tokens:,} tokens: {judge(result.interval, second, 'model', kind)}{warning}"
    )


def write_comparison_figure(runs: Sequence[RunRecord], axis: CurveAxis, out: Path) -> None:
    """Draws the loss curves of runs into a file."""
    for run in runs:
        if axis != "steps" and run.tokens_per_step is None:
            raise ModelError(
                f"{run.run_dir} does not record its tokens per step, since it is of an earlier "
                f"version, so it has no --x {axis}. Choose --x steps."
            )
    figure = comparison_figure(group_seeds(runs), axis)
    with atomic_path(out) as new:
        figure.savefig(new, format="png")
