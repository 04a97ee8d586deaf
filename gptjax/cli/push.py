"""`gptjax push`: a model for the Hugging Face hub, with a model card."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gptjax
from gptjax.config import RunConfig, config_options
from gptjax.data.datasets import DATASETS, PYTHON_HELP, PYTHON_LINES, WORD_TASKS
from gptjax.evaluation.run_comparison import RunRecord, read_run_records
from gptjax.exporters.export import DEFAULT_DTYPE, export_gguf, export_model
from gptjax.exporters.hf import HF_ARCHITECTURES, hf_model_type, hf_problem
from gptjax.exporters.model_card import model_card
from gptjax.fileio.atomic import write_atomic
from gptjax.plots.report import METRIC_NAMES, markdown_table
from gptjax.runtime.terminal import logger
from gptjax.tokenizer.chat_template import BUILTIN_TEMPLATES
from gptjax.weights.hub import is_repo_id, resolve_repo
from gptjax.weights.load import load
from gptjax.weights.model_folder import save

CARD_SECTIONS = ("model", "data", "optim", "train", "finetune")
PUBLIC_VALUES = {  # of options with free text: all others may be private, such as paths
    "data.source": "|".join(map(re.escape, [*DATASETS, PYTHON_HELP, PYTHON_LINES, WORD_TASKS])),
    "data.tokenizer": "gpt2|bytes|bpe:[0-9]+",
    "data.chat_template": "|".join(BUILTIN_TEMPLATES),
    "finetune.lora_targets": "[a-z_/* ]+",
}


@contextlib.contextmanager
def prepare_upload(source: str, repo_id: str, license_id: str) -> Iterator[Path]:
    """Writes the files to upload for MODEL into a temporary folder.

    They are those of a Hugging Face export and a GGUF file if transformers can load the
    model, else of a model folder; a run adds its results and config to the model card.
    """
    model = load(source)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "upload")
        if problem := hf_problem(model.config, bool(model.labels)):
            logger.info(f"format   gptjax, since transformers cannot load it: {problem}")
            save(model, folder)
        else:
            logger.info(export_model(model, "hf", folder).replace(f"{temporary}/", ""))
        facts: dict[str, Any] = {"location": repo_id, "license_id": license_id}
        if not problem:
            model_type = hf_model_type(model.config)
            facts |= {"architecture": HF_ARCHITECTURES[model_type].name, "model_type": model_type}
            if not model.labels:
                export_gguf(model, folder, DEFAULT_DTYPE)
                facts["has_gguf"] = True
        if Path(source, "config.toml").is_file():
            (run,) = read_run_records([Path(source)])
            facts |= {"sections": describe_training(run), "base_model": find_base_model(run.config)}
        write_atomic(folder / "README.md", model_card(model, **facts))
        yield folder


def find_base_model(config: RunConfig) -> str:
    """Name on the hub of the model that a run started from; "" if it has none."""
    name = config.finetune.init_from
    is_public = is_repo_id(name) and not Path(name).exists()
    return resolve_repo(name).name if is_public else ""


def describe_training(run: RunRecord) -> list[str]:
    """Results and options of a run, as Markdown; without its command and paths."""
    evaluations = {e.get("split", "validation"): e for e in run.events if e["event"] == "eval"}
    results = {
        split: {name: event[name] for name in METRIC_NAMES if event.get(name) is not None}
        for split, event in evaluations.items()
    }
    return [
        "## Results\n",
        f"After step {run.step:,} of {run.config.train.steps:,}:\n",
        *markdown_table("split", results),
        "## Training\n",
        f"Trained by gptjax {gptjax.__version__} with these options:\n",
        "```toml",
        *format_options(public_options(run.config)),
        "```\n",
    ]


def public_options(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Options that differ from their defaults, by section, without private values."""
    default, tables = RunConfig(), {}
    for name, field in config_options().items():
        section, _, option = name.partition(".")
        value = getattr(getattr(config, section), option)
        if section not in CARD_SECTIONS or value == getattr(getattr(default, section), option):
            continue
        if field.type is str and not re.fullmatch(PUBLIC_VALUES.get(name, ""), value):
            continue
        tables.setdefault(section, {})[option] = value
    return tables


def format_options(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a TOML file, whose values are written as in JSON."""
    for section, options in tables.items():
        yield f"[{section}]"
        yield from (f"{name} = {json.dumps(value)}" for name, value in options.items())
