"""The command `gptjax eval`."""

import json
from pathlib import Path
from typing import Any

import click

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, flag_option, value_option
from gptjax.cli.session import load_model, log_to_stderr


@click.command("eval", cls=Command)
@click.argument("model")
@value_option(
    "--text", "text file: loss in nats per token, perplexity and bits per byte", type=PATH
)
@value_option(
    "--classification-data",
    "labeled texts: accuracy and other metrics of a classifier",
    metavar="FILE",
)
@value_option(
    "--chat-data",
    "conversations: the answers of an assistant compared with the references",
    metavar="FILE",
)
@value_option(
    "--stride",
    "--text: tokens between the starts of two windows; fewer give each token more context",
    type=int,
    shown="the context length",
)
@value_option("--out", "--chat-data: write the answers as JSON lines", type=PATH)
@value_option(
    "--judge",
    "--chat-data: OpenAI-compatible endpoint of a model that scores the answers",
    metavar="URL",
)
@value_option("--judge-model", "--judge: name of the model", "llama3")
@flag_option("--json", "print one JSON object", "as_json")
@arguments.model_session_arguments
def run_evaluate(
    model: str,
    text: Path | None,
    classification_data: str | None,
    chat_data: str | None,
    stride: int | None,
    out: Path | None,
    judge: str | None,
    judge_model: str,
    as_json: bool,
    int8: bool,
    verbose: bool,
) -> None:
    """Evaluate a model on a text, labeled texts or conversations.

    MODEL is described in gptjax --help. One of --text, --classification-data and
    --chat-data is required.
    """
    if [text, classification_data, chat_data].count(None) != 2:
        raise click.UsageError("eval takes one of --text, --classification-data and --chat-data.")
    loaded = load_model(model, int8=int8, verbose=verbose)
    metrics: Any = {}
    lines: list[str] = []
    if chat_data:
        from gptjax.evaluation.instructions import evaluate_file
        from gptjax.evaluation.llm_judge import LLMJudge

        scorer = LLMJudge(judge, judge_model) if judge else None
        metrics, tasks = evaluate_file(loaded, chat_data, out, scorer, log_to_stderr)
        lines = [f"{task:<18} {x['exact_match']:.4f} exact" for task, x in tasks.items()]
        for name, x in metrics.items():
            lines.append(f"{name:<18} {x:.4f}" if isinstance(x, float) else f"{name:<18} {x}")
        metrics |= {"tasks": tasks} if tasks else {}
    elif classification_data:
        from gptjax.evaluation.classification import evaluate_labeled_file

        metrics = evaluate_labeled_file(loaded, classification_data)
        lines = [f"{name:<18} {value:.4f}" for name, value in metrics.items()]
    elif text:
        from gptjax.data.readers import read_text_file
        from gptjax.evaluation.perplexity import score

        result = score(loaded, read_text_file(text), stride=stride)
        lines = [f"tokens         {result.tokens:,} for {result.bytes:,} bytes"]
        lines += [f"loss           {result.loss:.4f} nats per token"]
        lines += [f"perplexity     {result.perplexity:.4f}"]
        if result.bits_per_byte is not None:
            lines += [f"bits per byte  {result.bits_per_byte:.4f}"]
        metrics = result.to_dict()
    print(json.dumps(metrics) if as_json else "\n".join(lines))
