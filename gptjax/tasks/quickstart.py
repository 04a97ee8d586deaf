"""Quickstart: pretraining and fine-tuning in miniature, on text from Python itself."""

import dataclasses
import gzip
import lzma
import math
from pathlib import Path
from typing import Any

from gptjax.config import find_config, load_config
from gptjax.data.datasets import read_python_help
from gptjax.data.prepare import open_dataset
from gptjax.evaluation.perplexity import Evaluation, score_tokens
from gptjax.fileio.atomic import write_atomic
from gptjax.plots.report import markdown_table
from gptjax.runtime.terminal import logger
from gptjax.tasks.train import train
from gptjax.training.metrics import read_events
from gptjax.weights.model_folder import Model

CLASSIFIER_DIR = "classifier"  # subfolder of the run for the second stage
ASSISTANT_DIR = "assistant"  # subfolder for the third stage
SCORE_COLUMNS = ("before", "after")


def quickstart(run_dir: Path) -> Evaluation:
    """Trains `configs/quickstart.toml` in `run_dir` and scores the held-out topics.

    Calling it again prints the result without training.
    """
    logger.info("gptjax quickstart: text -> tokens -> a GPT -> text, all on this machine")
    logger.info("text     Python's help topics, one tenth held out")
    config = load_config(find_config("quickstart"))
    model = train(config, run_dir)
    tokens: Any = open_dataset(config.data, run_dir / "data").validation
    held_out = tokens.read(0, len(tokens))
    stride = config.model.context_length // 4
    result = score_tokens(model, held_out, stride, model.tokenizer.eot_token)
    text = "\n".join(read_python_help()).encode()
    gzip_bits = 8 * len(gzip.compress(text, 9)) / len(text)
    xz_bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    logger.info(
        f"result   {result.bits_per_byte:.3f} bits per byte on the held-out topics "
        f"(on all the text, gzip -9 needs {gzip_bits:.2f} and xz {xz_bits:.2f})"
    )
    compare_classifiers(run_dir, model)
    train_word_assistant(run_dir)
    logger.info("next")
    logger.info(f"  gptjax generate {run_dir} 'The \"for\" statement'")
    texts = "'for n in range(3):' 'A long story.'"
    logger.info(f"  gptjax classify {run_dir / CLASSIFIER_DIR} {texts}")
    logger.info(f"  gptjax chat {run_dir / ASSISTANT_DIR}  # then type: planet reversed")
    logger.info("  gptjax train tinyshakespeare")
    return result


def compare_classifiers(run_dir: Path, model: Model) -> None:
    """Fine-tunes a classifier from the pretrained model and from random parameters.

    Both runs take the same steps on the same lines, so the difference measures the
    effect of pretraining. The first is written to `run_dir`/classifier; report.md
    compares the two.
    """
    logger.info("classes  lines of Python's standard library: code or docstring prose?")
    config = load_config(find_config("classify/python_lines"))
    configs = {
        CLASSIFIER_DIR: dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, tokenizer=""),
            finetune=dataclasses.replace(config.finetune, init_from=str(run_dir / "model")),
        ),
        f"{CLASSIFIER_DIR}-random": dataclasses.replace(
            config,
            model=dataclasses.replace(model.config, context_length=config.model.context_length),
            data=dataclasses.replace(config.data, tokenizer=str(run_dir / "model")),
        ),
    }
    accuracies = []
    for name, classifier_config in configs.items():
        was_disabled = logger.disabled
        logger.disabled |= name != CLASSIFIER_DIR
        try:
            train(classifier_config, run_dir / name)
        finally:
            logger.disabled = was_disabled
        events = read_events(run_dir / name / "metrics.jsonl")
        accuracies += [e["accuracy"] for e in events if e.get("split") == "test"]
    text = (
        f"{accuracies[0]:.1%} test accuracy from the pretrained model, "
        f"{accuracies[1]:.1%} from random initialization, after {config.train.steps} "
        "steps each; chance is 50%"
    )
    append_report(run_dir, "Code or prose", f"{text}.\n")
    logger.info(f"transfer {text}")


def train_word_assistant(run_dir: Path) -> None:
    """Fine-tunes the pretrained model into an assistant for word tasks.

    It uses a byte tokenizer: it takes the blocks and the embeddings of the single-byte
    tokens from the pretrained model. The test words are held out of training; report.md
    compares the exact matches before and after.
    """
    logger.info("answers  small tasks on words of the text; test words are held out")
    config = load_config(find_config("instruct/words"))
    finetune_config = dataclasses.replace(config.finetune, init_from=str(run_dir / "model"))
    config = dataclasses.replace(config, finetune=finetune_config)
    train(config, run_dir / ASSISTANT_DIR)
    events = read_events(run_dir / ASSISTANT_DIR / "metrics.jsonl")
    scores = {e["step"]: e["tasks"] for e in events if e.get("split") == "test"}
    after = scores[config.train.steps]
    before = scores.get(0, dict.fromkeys(after, math.nan))  # nan: metrics.jsonl was deleted
    rows = {task: {"before": before[task], "after": after[task]} for task in sorted(after)}
    means = {name: sum(row[name] for row in rows.values()) / len(rows) for name in SCORE_COLUMNS}
    for task, row in rows.items():
        logger.info(f"task     {task:<14} {row['before']:.2f} -> {row['after']:.2f}")
    text = (
        f"exact match {means['after']:.4f} on held-out words, mean over "
        f"{len(rows)} tasks; {means['before']:.4f} before fine-tuning"
    )
    lines = markdown_table("task", rows | {"mean": means})
    append_report(run_dir, "Words", "\n".join([f"{text}.", "", *lines]))
    logger.info(f"assistant {text}")


def append_report(run_dir: Path, title: str, text: str) -> None:
    """Appends a section to report.md."""
    path = run_dir / "report.md"
    write_atomic(path, f"{path.read_text(encoding='utf-8')}\n## {title}\n\n{text}")
