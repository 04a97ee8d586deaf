"""The commands of a MODEL: generate, chat, classify, eval, import and export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, flag_option, value_option
from gptjax.cli.session import load_model, log_to_console
from gptjax.config import CONTEXT
from gptjax.errors import ConfigError
from gptjax.runtime.terminal import (
    print_message,
    print_progress,
    print_result,
    read_stdin,
    stdin_lines,
)


@click.command("generate", cls=Command)
@click.argument("model")
@click.argument("prompt", required=False)
@value_option(
    "--few-shot",
    'examples before the prompt, one {"input": ..., "output": ...} per line; the '
    "completion ends with its line",
    type=PATH,
    shown="no examples",
    metavar="FILE.jsonl",
)
@flag_option("--chat", "answer the prompt as an assistant, in its chat template")
@arguments.sampling_arguments(max_new_tokens=100, temperature=0.8)
@arguments.sampling_option(
    "min_p", "minimum probability of a token, relative to the most likely one", 0.0, metavar="P"
)
@arguments.sampling_option("repetition_penalty", "penalty on repeated tokens; 1 = off", 1.0)
@value_option(
    "--stop", "text that ends the completion; may be repeated", multiple=True, metavar="TEXT"
)
@arguments.sampling_option("samples", "number of completions", 1)
@flag_option("--json", "print one JSON object per completion", "as_json")
@arguments.model_session_arguments
def run_generate(
    model: str,
    prompt: str | None,
    few_shot: Path | None,
    chat: bool,
    stop: tuple[str, ...],
    samples: int,
    as_json: bool,
    int8: bool,
    verbose: bool,
    **sampling: Any,
) -> None:
    """Complete a prompt, or answer it as an assistant (--chat).

    MODEL is described in gptjax --help. PROMPT is read from stdin, without its last
    line break, if it is missing.
    """
    from gptjax.inference.generate import GenerationConfig, complete, few_shot_prompt, stream

    if chat and (few_shot or samples > 1 or as_json):
        raise ConfigError("--chat excludes --few-shot, --samples and --json.")
    sampling["stop"] = stop or ("\n",) * (few_shot is not None)
    GenerationConfig(**sampling)  # an error comes before all work and output
    if prompt is None:
        prompt = read_stdin().removesuffix("\n")
    shown = "" if few_shot else prompt
    prompt = few_shot_prompt(few_shot, prompt) if few_shot else prompt
    loaded = load_model(model, int8=int8, verbose=verbose, last_phase="first token")
    if chat:
        from gptjax.inference.assistant import answer

        print_result(answer(loaded, prompt, **sampling))
        return
    if samples == 1 and not as_json:
        pieces = stream(loaded, prompt, **sampling)
        print_result(shown, end="")
        for piece in pieces:
            print_result(piece, end="")
        print_result("")
        return
    for sample in complete(loaded, prompt, samples=samples, **sampling):
        if as_json:
            print_result(json.dumps(dataclasses.asdict(sample)))
        else:
            print_result(f"--- {sample.finish_reason}\n{shown}{sample.text}")


@click.command("chat", cls=Command)
@click.argument("model")
@arguments.sampling_arguments(max_new_tokens=256, temperature=0.7)
@arguments.model_session_arguments
def start_chat(model: str, int8: bool, verbose: bool, **sampling: Any) -> None:
    """Talk to an assistant in the terminal.

    MODEL is described in gptjax --help. /help lists the commands of the chat.
    """
    from gptjax.cli.chat import run_chat

    loaded = load_model(model, int8=int8, verbose=verbose, last_phase="first token")
    run_chat(loaded, model, sampling)


@click.command("classify", cls=Command)
@click.argument("model")
@click.argument("texts", nargs=-1, metavar="[TEXT ...]")
@value_option(
    "--file",
    "CSV, TSV, JSON lines or text file to label, together with --out",
    type=PATH,
    metavar="IN",
)
@value_option(
    "--out", "copy of IN with a label and its probability in each row", type=PATH, metavar="OUT"
)
@value_option("--text", "text column of IN", "", shown="detect", dest="text_column")
@flag_option("--json", "print one JSON object per text", "as_json")
@arguments.model_session_arguments
def run_classify(
    model: str,
    texts: tuple[str, ...],
    file: Path | None,
    out: Path | None,
    text_column: str,
    as_json: bool,
    int8: bool,
    verbose: bool,
) -> None:
    """Label texts, or every row of a file, with probabilities.

    MODEL is described in gptjax --help. Without TEXT and --file, each line of stdin is
    a text.
    """
    from gptjax.inference.classify import Prediction, classify
    from gptjax.inference.label_file import label_file

    if (file is None) != (out is None) or (file and texts) or (text_column and not file):
        raise ConfigError(
            "classify takes texts, or --file IN with --out OUT; --text belongs to --file."
        )
    loaded, num_truncated = load_model(model, int8=int8, verbose=verbose), 0

    def predict(texts: list[str]) -> list[Prediction]:
        nonlocal num_truncated
        predictions = classify(loaded, texts)
        num_truncated += sum(prediction.truncated > 0 for prediction in predictions)
        return predictions

    if file and out:
        label_file(
            file,
            out,
            lambda texts: [label[:2] for label in predict(texts)],
            text_column=text_column,
            usual_column=loaded.columns[0] if loaded.columns else "",
        )
    else:
        lines = list(texts) or [line for x in stdin_lines() if (line := x.removesuffix("\n"))]
        for text, result in zip(lines, predict(lines), strict=True):
            if as_json:
                print_result(json.dumps({"text": text, **result._asdict()}))
            else:
                print_result(f"{result.label} {result.probability:.3f}  {text}")
    if num_truncated:
        context = loaded.config.context_length
        print_message(f"{num_truncated:,} texts were cut to the model's {context:,} tokens")


@click.command("eval", cls=Command)
@click.argument("model")
@value_option("--text", "text file: loss (nats per token), perplexity and bits per byte", type=PATH)
@value_option(
    "--classification-data",
    "labeled texts: accuracy and other metrics of a classifier",
    metavar="FILE",
)
@value_option(
    "--text-column", "--classification-data: column of the texts", "", shown="as in training"
)
@value_option(
    "--label-column", "--classification-data: column of the labels", "", shown="as in training"
)
@value_option(
    "--chat-data",
    "conversations: the answers of an assistant compared with the references",
    metavar="FILE",
)
@value_option(
    "--context",
    "--text: tokens of a window",
    type=int,
    shown="the context length",
    valid_range=CONTEXT,
)
@value_option(
    "--stride",
    "--text: tokens between the starts of two windows; fewer give each token more context",
    type=int,
    shown="--context",
    valid_range=CONTEXT,
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
    text_column: str,
    label_column: str,
    chat_data: str | None,
    context: int | None,
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
    if (text_column or label_column) and not classification_data:
        raise ConfigError("--text-column and --label-column belong to --classification-data.")
    if (context or stride) and not text:
        raise ConfigError("--context and --stride belong to --text.")
    if (out or judge) and not chat_data:
        raise ConfigError("--out and --judge belong to --chat-data.")
    scorer = None
    if judge:  # its requirements are checked before any work
        from gptjax.evaluation.llm_judge import LLMJudge

        scorer = LLMJudge(judge, judge_model)
    loaded = load_model(model, int8=int8, verbose=verbose)
    metrics: Any = {}
    tasks: Any = {}
    if chat_data:
        from gptjax.evaluation.instructions import evaluate_file

        metrics, tasks = evaluate_file(loaded, chat_data, out, scorer)
    elif classification_data:
        from gptjax.evaluation.classification import evaluate_labeled_file

        metrics = evaluate_labeled_file(loaded, classification_data, text_column, label_column)
    elif text:
        from gptjax.data.readers import read_text_file
        from gptjax.evaluation.perplexity import score

        windows = {"context": context, "stride": stride}
        metrics = score(loaded, read_text_file(text), **windows).to_dict()
    if as_json:
        print_result(json.dumps(metrics | ({"tasks": tasks} if tasks else {})))
        return
    for task, scores in tasks.items():
        print_result(f"{task:<18} {scores['exact_match']:.4f} exact")
    for name, value in metrics.items():
        value = ", ".join(value) if isinstance(value, list) else value
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print_result(f"{name:<18} {shown}")


@click.command("import", cls=Command)
@click.argument("source")
@value_option("--out", "new model folder", type=PATH, required=True, metavar="DIR")
def run_import(source: str, out: Path) -> None:
    """Convert public or foreign weights to a model folder.

    SOURCE is any MODEL of gptjax --help.
    """
    from gptjax.weights.load import convert_model

    with log_to_console():
        convert_model(source, out)


@click.command("export", cls=Command)
@click.argument("model")
@value_option("--to", "format of the export", required=True, metavar="hf|book", dest="layout")
@value_option("--out", "new folder", type=PATH, required=True, metavar="DIR")
def run_export(model: str, layout: str, out: Path) -> None:
    """Export a model for other tools and verify its logits.

    MODEL is described in gptjax --help.
    """
    from gptjax.weights.export import export_model
    from gptjax.weights.load import load

    with log_to_console(print_message):
        loaded = load(model)
    print_progress(export_model(loaded, layout, out))
