"""The whole road in miniature, on text that every Python carries."""

import dataclasses
import gzip
import lzma
from pathlib import Path
from typing import Any

from gptjax.classification import train_classifier
from gptjax.config import config_path, read_config
from gptjax.data.named import python_help
from gptjax.data.prepare import open_dataset
from gptjax.evaluate import Evaluation, score_tokens
from gptjax.instruct import train_assistant
from gptjax.pretrain import pretrain
from gptjax.report import read_events
from gptjax.report_answers import table
from gptjax.run_task import Say
from gptjax.weights.folder import Model

CLASSIFIER = "classifier"  # where the second stage goes, in the folder of the run
ASSISTANT = "assistant"  # and the third
MEANS = ("before", "after")


def quickstart(folder: Path, say: Say = print) -> Evaluation:
    """Trains `configs/quickstart.toml` in `folder` and scores the held-out topics.

    The number of steps is fixed, so the result does not depend on how fast the
    machine is; the same call again shows it without training.

    Raises:
        GptjaxError: the folder cannot be used.
        Stopped: a signal came; the same call goes on later.
    """
    say("gptjax quickstart: text -> tokens -> a GPT -> text, on this machine alone")
    say("text     the help topics of Python itself, one tenth of them held out")
    config = read_config(config_path("quickstart"))
    model = pretrain(config, folder, say)
    tokens: Any = open_dataset(config.data, folder / "data").validation
    held_out = tokens.read(0, len(tokens))
    stride = config.model.context_length // 4
    result = score_tokens(model, held_out, stride, model.tokenizer.eot)
    text = "\n".join(python_help()).encode()
    gzip_bits = 8 * len(gzip.compress(text, 9)) / len(text)
    xz_bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    say(
        f"result   {result.bits_per_byte:.3f} bits per byte on the held-out topics "
        f"(of all the text, gzip -9 needs {gzip_bits:.2f} and xz {xz_bits:.2f})"
    )
    compare_classifiers(folder, model, say)
    teach_words(folder, say)
    say("next")
    say(f"  gptjax generate {folder} 'The \"for\" statement'")
    say(f"  gptjax classify {folder / CLASSIFIER} 'for n in range(3):' 'A long story.'")
    say(f"  gptjax chat {folder / ASSISTANT}  # then type: planet reversed")
    say("  gptjax train tinyshakespeare")
    return result


def compare_classifiers(folder: Path, model: Model, say: Say) -> None:
    """Fine-tunes into a classifier twice: from the model, and from random parameters.

    Both take the same steps on the same lines, so the difference is what pretraining
    gave. The first is kept in `folder`/classifier, and report.md says how both did.
    """
    say("classes  lines of Python's own library: code, or prose of its docstrings?")
    config = read_config(config_path("classify/python_lines"))
    starts = {
        CLASSIFIER: dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, tokenizer=""),
            tune=dataclasses.replace(config.tune, start=str(folder / "model")),
        ),
        f"{CLASSIFIER}-random": dataclasses.replace(
            config,
            model=dataclasses.replace(
                model.config, context_length=config.model.context_length
            ),
            data=dataclasses.replace(config.data, tokenizer=str(folder / "model")),
        ),
    }
    accuracy = []
    for name, start in starts.items():
        train_classifier(start, folder / name, say if name == CLASSIFIER else mute)
        events = read_events(folder / name / "metrics.jsonl")
        accuracy += [e["accuracy"] for e in events if e.get("split") == "test"]
    text = (
        f"{accuracy[0]:.4f} of the test lines right from the pretrained model, "
        f"{accuracy[1]:.4f} from random parameters, after {config.train.steps} steps "
        "each; guessing has 0.5"
    )
    with (folder / "report.md").open("a", encoding="utf-8") as file:
        file.write(f"\n## Code or prose\n\n{text}.\n")
    say(f"pays     {text}")


def teach_words(folder: Path, say: Say) -> None:
    """Fine-tunes the pretrained model into an assistant that does things to words.

    It reads and writes bytes: of the pretrained model it takes over the blocks and the
    rows of the tokens that are single bytes. The words of the test were never shown to
    it; report.md says how many answers were right before and after.
    """
    say("answers  small tasks on words of the text; those of the test are never shown")
    config = read_config(config_path("instruct/words"))
    tune = dataclasses.replace(config.tune, start=str(folder / "model"))
    train_assistant(dataclasses.replace(config, tune=tune), folder / ASSISTANT, say)
    events = read_events(folder / ASSISTANT / "metrics.jsonl")
    before, *_, after = [e["tasks"] for e in events if e.get("split") == "test"]
    rows = {
        task: {"before": before[task], "after": after[task]} for task in sorted(after)
    }
    means = {
        name: sum(row[name] for row in rows.values()) / len(rows) for name in MEANS
    }
    for task, row in rows.items():
        say(f"task     {task:<14} {row['before']:.2f} -> {row['after']:.2f}")
    text = (
        f"{means['after']:.4f} of the answers on held-out words are exact, mean over "
        f"{len(rows)} tasks; before, {means['before']:.4f} were"
    )
    with (folder / "report.md").open("a", encoding="utf-8") as file:
        lines = table("task", rows | {"mean": means})
        file.write("\n".join(["", "## Words", "", f"{text}.", "", *lines]))
    say(f"words    {text}")


def mute(line: str) -> None:
    """Says nothing."""
