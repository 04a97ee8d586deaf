"""The commands of a MODEL: generate, chat, classify, eval, import and export."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gptjax.cli import arguments
from gptjax.cli.arguments import PATH, Command, flag_option, list_option, value_option
from gptjax.cli.session import load_model, log_to_console
from gptjax.config import CONTEXT, Range
from gptjax.errors import ConfigError
from gptjax.runtime.terminal import (
    print_message,
    print_progress,
    print_result,
    read_stdin,
    stdin_lines,
)

NUM_FEW_SHOT = Range(0, 10**4)

Load = Callable[[], Any]  # loads the model


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


def evaluate_text(load: Load, text: Path, context: int | None, stride: int | None) -> Any:
    """Loss, perplexity and bits per byte of a text file."""
    from gptjax.data.readers import read_text_file
    from gptjax.evaluation.perplexity import score

    return score(load(), read_text_file(text), context=context, stride=stride).to_dict()


def evaluate_labels(
    load: Load, classification_data: str, text_column: str, label_column: str
) -> Any:
    """Metrics of a classifier on labeled texts."""
    from gptjax.evaluation.classification import evaluate_labeled_file

    return evaluate_labeled_file(load(), classification_data, text_column, label_column)


def evaluate_chat(
    load: Load, chat_data: str, out: Path | None, judge: str | None, judge_model: str
) -> Any:
    """Scores of the answers of an assistant, also by task."""
    from gptjax.evaluation.instructions import evaluate_file
    from gptjax.evaluation.llm_judge import LLMJudge

    # The requirements of a judge are checked before any work.
    scorer = LLMJudge(judge, judge_model) if judge else None
    metrics, tasks = evaluate_file(load(), chat_data, out, scorer)
    return metrics | ({"tasks": tasks} if tasks else {})


def evaluate_choices(
    load: Load, choices: Path, few_shot: Path | None, num_fewshot: int | None, out: Path | None
) -> Any:
    """Accuracy on multiple-choice questions."""
    from gptjax.evaluation.multiple_choice import evaluate_questions

    if num_fewshot and few_shot is None:
        raise ConfigError(f"--num-fewshot {num_fewshot} needs --few-shot FILE with the examples.")
    return evaluate_questions(load(), choices, few_shot, num_fewshot, out)


def evaluate_last_word(load: Load, last_word: Path, out: Path | None) -> Any:
    """Accuracy and perplexity of the last words of texts."""
    from gptjax.evaluation.multiple_choice import evaluate_last_words

    return evaluate_last_words(load(), last_word, out)


def evaluate_harness(
    load: Load, tasks: tuple[str, ...], num_fewshot: int | None, out: Path | None
) -> Any:
    """Metrics of tasks of lm-evaluation-harness."""
    from gptjax.evaluation.lm_harness import evaluate_tasks

    return {"tasks": evaluate_tasks(load, tasks, num_fewshot, out)}


def run_suite(load: Load, suite: str) -> Any:
    """Accuracy on the tasks of the small suite."""
    from gptjax.evaluation.small_suite import evaluate_suite

    return {"tasks": {name: score._asdict() for name, score in evaluate_suite(load()).items()}}


# Evaluations of `gptjax eval` by their option: a function of a loader of the model, of
# this option and of those that belong to it.
EVAL_MODES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "text": (evaluate_text, ("context", "stride")),
    "classification_data": (evaluate_labels, ("text_column", "label_column")),
    "chat_data": (evaluate_chat, ("out", "judge", "judge_model")),
    "choices": (evaluate_choices, ("few_shot", "num_fewshot", "out")),
    "last_word": (evaluate_last_word, ("out",)),
    "tasks": (evaluate_harness, ("num_fewshot", "out")),
    "suite": (run_suite, ()),
}


@click.command("eval", cls=Command)
@click.argument("model")
@value_option("--text", "text file: loss (nats per token), perplexity and bits per byte", type=PATH)
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
    "--judge",
    "--chat-data: OpenAI-compatible endpoint of a model that scores the answers",
    metavar="URL",
)
@value_option("--judge-model", "--judge: name of the model", "llama3")
@value_option(
    "--choices",
    "multiple-choice questions: accuracy, also normalized by the length of the choices; one "
    '{"context": ..., "choices": [...], "answer": ...} per line',
    type=PATH,
    metavar="FILE.jsonl",
)
@value_option(
    "--few-shot",
    "--choices: solved questions before each question, in the same format",
    type=PATH,
    metavar="FILE.jsonl",
)
@value_option(
    "--num-fewshot",
    "--choices, --tasks: number of solved questions before each question",
    type=int,
    shown="all of --few-shot; as the task says",
    valid_range=NUM_FEW_SHOT,
)
@value_option(
    "--last-word",
    'texts: accuracy and perplexity of the last word, as in LAMBADA; one {"text": ...} per line',
    type=PATH,
    metavar="FILE.jsonl",
)
@list_option(
    "--tasks",
    "tasks of lm-evaluation-harness by name, or its .yaml files",
    shown="none",
    kind=click.STRING,
    metavar="TASK",
)
@value_option(
    "--suite",
    "built-in tasks for small models: last words, brackets, indentation, copying, word rules",
    type=click.Choice(["small"]),
    shown="none",
)
@value_option(
    "--out",
    "--chat-data, --choices, --last-word, --tasks: write the results per row as JSON lines",
    type=PATH,
)
@flag_option("--json", "print one JSON object", "as_json")
@arguments.model_session_arguments
def run_evaluate(model: str, as_json: bool, int8: bool, verbose: bool, **options: Any) -> None:
    """Evaluate a model on texts, labels, conversations or benchmarks.

    MODEL is described in gptjax --help. One of --text, --classification-data,
    --chat-data, --choices, --last-word, --tasks and --suite is required.
    """
    names = {name: f"--{name.replace('_', '-')}" for name in options}
    modes = [mode for mode in EVAL_MODES if options[mode]]
    if len(modes) != 1:
        raise click.UsageError(f"eval takes one of {', '.join(names[x] for x in EVAL_MODES)}.")
    mode = modes[0]
    evaluate, belonging = EVAL_MODES[mode]
    context = click.get_current_context()
    for name in options.keys() - {mode, *belonging}:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            owners = [names[owner] for owner, (_, others) in EVAL_MODES.items() if name in others]
            raise ConfigError(f"{names[name]} belongs to {' and '.join(owners)}.")
    load = functools.partial(load_model, model, int8=int8, verbose=verbose)
    metrics = evaluate(load, *(options[name] for name in (mode, *belonging)))
    if as_json:
        print_result(json.dumps(metrics))
    else:
        print_metrics(**metrics)


def print_metrics(tasks: Any = None, **metrics: Any) -> None:
    """Prints a line per task and per metric."""

    def format_value(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    for task, scores in (tasks or {}).items():
        values = (f"{name} {format_value(value)}" for name, value in scores.items())
        print_result(f"{task:<18} {', '.join(values)}")
    for name, value in metrics.items():
        print_result(f"{name:<18} {format_value(value)}")


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
@value_option(
    "--to", "format: hf, book, gguf or ollama", required=True, metavar="FORMAT", dest="layout"
)
@value_option("--out", "new folder", type=PATH, required=True, metavar="DIR")
@value_option(
    "--dtype",
    "--to gguf, ollama: type of the matrices",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    shown="f16",
)
def run_export(model: str, layout: str, out: Path, dtype: str | None) -> None:
    """Export a model for other tools and verify the result.

    MODEL is described in gptjax --help. hf is a folder for transformers, gguf a file
    for llama.cpp, ollama that file with a Modelfile, book a state dict of the book's
    GPTModel.
    """
    from gptjax.exporters.export import export_model
    from gptjax.weights.load import load

    with log_to_console(print_message):
        loaded = load(model)
    print_progress(export_model(loaded, layout, out, dtype or ""))


@click.command("push", cls=Command)
@click.argument("model")
@click.argument("repository", metavar="OWNER/NAME")
@value_option("--license", "license in the model card, such as apache-2.0", "unknown", dest="terms")
@flag_option("--private", "create the repository as a private one")
@flag_option("--dry-run", "list the files instead of uploading them")
def run_push(model: str, repository: str, terms: str, private: bool, dry_run: bool) -> None:
    """Upload a model to the Hugging Face hub, with a model card.

    MODEL is described in gptjax --help. The card of a run has its results and options;
    neither its command nor any local path is uploaded. `hf auth login` sets the token.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", terms):
        raise ConfigError(
            f"--license {terms!r} is not an identifier of the hub. Use one such as apache-2.0."
        )
    from gptjax.cli.push import prepare_upload
    from gptjax.weights.hub_upload import check_repo_id, upload_folder

    check_repo_id(repository)
    with log_to_console(print_message), prepare_upload(model, repository, terms) as folder:
        for file in sorted(folder.iterdir()):
            print_result(f"{file.stat().st_size:>13,}  {file.name}")
        if not dry_run:
            print_progress(f"uploaded {upload_folder(folder, repository, private=private)}")
