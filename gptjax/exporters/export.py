"""Exports models in formats that other tools load.

hf      Hugging Face GPT-2, Llama or Qwen 3 (for transformers, vLLM, ...)
book    state dict of the book's PyTorch GPTModel, whose output head is never tied
gguf    file for llama.cpp and the tools built on it, such as LM Studio
ollama  such a file with a Modelfile for Ollama

Every export is loaded again and must reproduce the logits, or the rounded parameters,
before it is kept.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.config import did_you_mean
from gptjax.errors import ConfigError, ModelError
from gptjax.exporters.book import write_book
from gptjax.exporters.gguf import read_back, write_gguf
from gptjax.exporters.hf import write_hf
from gptjax.exporters.ollama import modelfile
from gptjax.fileio.atomic import atomic_path, write_atomic
from gptjax.model.classifier import class_logits
from gptjax.model.gpt import apply
from gptjax.tree import num_params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model, write_chat_template

NUM_CHECK_TOKENS = 16
# Relative to the largest logit: float32 rounding is 6e-8 per sum, of some hundred sums.
EXPORT_TOLERANCE = 1e-5
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
DEFAULT_DTYPE = "f16"  # of GGUF files


def export_model(model: Model, layout: str, output_dir: Path, dtype: str = "") -> str:
    """Exports the model and verifies the result; returns a summary for the user.

    `output_dir` must not exist yet, or be empty; it is created only after verification.
    `dtype` is that of a GGUF file, one of `GGUF_DTYPES`.
    """
    if layout not in EXPORTERS:
        raise ConfigError(
            f"cannot export to {layout!r}.{did_you_mean(layout, EXPORTERS)} "
            f"Known: {', '.join(EXPORTERS)}."
        )
    if dtype and layout not in ("gguf", "ollama"):
        raise ConfigError(f"--dtype {dtype} belongs to --to gguf and ollama. Leave it out.")
    if dtype not in ("", *GGUF_DTYPES):
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(GGUF_DTYPES)}.")
    try:
        with atomic_path(output_dir) as new_dir:
            if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
                raise ModelError(f"{output_dir} already exists. Choose another folder with --out.")
            new_dir.mkdir()
            reloaded, result = EXPORTERS[layout](model, new_dir, dtype or DEFAULT_DTYPE)
    except OSError as error:
        raise ModelError(f"cannot write {output_dir}: {error}. Choose another.") from error
    lost = ", ".join(list_differences(model, reloaded))
    return (
        f"wrote    {output_dir} ({layout}): {num_params(model.params):,} parameters; {result}"
    ) + (f"\nnot exported: {lost}" if lost else "")


def export_hf(model: Model, folder: Path, dtype: str) -> tuple[Model, str]:
    """Writes a folder for transformers; returns the reloaded model and a summary."""
    write_hf(model, folder)
    return reload_folder(model, folder)


def export_book(model: Model, folder: Path, dtype: str) -> tuple[Model, str]:
    """Writes a folder in the book's format, as `export_hf` does."""
    write_book(model, folder)
    return reload_folder(model, folder)


def reload_folder(model: Model, folder: Path) -> tuple[Model, str]:
    """Adds the tokenizer and template of a folder, and compares the logits."""
    model.tokenizer.save(folder)
    if model.chat_template:
        write_chat_template(model.chat_template, folder)
    reloaded = load(folder)
    difference = compare_logits(model, reloaded)
    return reloaded, f"logits of the reloaded model differ by at most {difference:.3g}"


def gguf_path(folder: Path, dtype: str) -> Path:
    """Returns the file of a folder that `export_gguf` writes."""
    return folder / f"model-{dtype}.gguf"


def export_gguf(model: Model, folder: Path, dtype: str) -> tuple[Model, str]:
    """Writes a GGUF file, as `export_hf` does a folder."""
    path = gguf_path(folder, dtype)
    write_gguf(model, path, dtype)
    reloaded = load(path)
    for name, expected, found in read_back(model, path, dtype):
        if not np.array_equal(expected, found):
            raise ModelError(
                f"{name} of the exported file differs, so the export was discarded. This is a "
                "bug in gptjax: please report it."
            )
    if dtype == "f32":
        compare_logits(model, reloaded)
    return reloaded, f"{path.name} has {path.stat().st_size:,} bytes, read back as written"


def export_ollama(model: Model, folder: Path, dtype: str) -> tuple[Model, str]:
    """Writes a GGUF file and its Modelfile, as `export_gguf` does."""
    write_atomic(folder / "Modelfile", modelfile(model, gguf_path(folder, dtype).name))
    reloaded, result = export_gguf(model, folder, dtype)
    return reloaded, f"{result}\nnext     ollama create NAME -f Modelfile, in that folder"


Exporter = Callable[[Model, Path, str], tuple[Model, str]]
EXPORTERS: dict[str, Exporter] = {
    "hf": export_hf,
    "book": export_book,
    "gguf": export_gguf,
    "ollama": export_ollama,
}


def list_differences(model: Model, reloaded: Model) -> list[str]:
    """Names the fields of a model, except parameters, that the reloaded one lacks."""

    def parts(m: Model) -> dict[str, Any]:
        values = {field.name: getattr(m, field.name) for field in dataclasses.fields(m)}
        values |= {f"model.{n}": v for n, v in dataclasses.asdict(values.pop("config")).items()}
        tokenizer = {"tokenizer": m.tokenizer.hash, "stop tokens": m.tokenizer.stop_ids}
        return values | tokenizer | {"params": None}

    old, new = parts(model), parts(reloaded)
    return [name for name in old if old[name] != new[name]]


def compare_logits(model: Model, reloaded: Model) -> float:
    """Returns the largest logit difference; ModelError if more than rounding errors."""
    length = min(NUM_CHECK_TOKENS, model.config.context_length)
    rng = np.random.default_rng(0)
    token_BT = jnp.asarray(rng.integers(model.config.vocab_size, size=(1, length)))
    length_B = jnp.array([length // 2 + 1])
    logits, reloaded_logits = (
        class_logits(m.config, m.params, token_BT, length_B)
        if model.labels
        else apply(m.config, m.params, token_BT)[..., : model.config.vocab_size]
        for m in (model, reloaded)
    )
    difference = float(np.abs(np.asarray(logits) - np.asarray(reloaded_logits)).max())
    # Sums may round differently without the padding of the vocabulary.
    if not difference <= EXPORT_TOLERANCE * np.abs(logits).max():  # also rejects nan
        raise ModelError(
            f"the logits of the exported model differ by up to {difference}, so the "
            "export was discarded. This is a bug in gptjax: please report it."
        )
    return difference
