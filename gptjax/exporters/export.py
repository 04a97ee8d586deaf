"""Exports models in formats that other tools load.

hf    Hugging Face GPT-2, Llama or Qwen 3 (for transformers, llama.cpp, vLLM, ...)
book  state dict of the book's PyTorch GPTModel, whose output head is never tied

Every export is loaded again and must reproduce the logits before it is kept.
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
from gptjax.exporters.hf import write_hf
from gptjax.fileio.atomic import atomic_path
from gptjax.model.classifier import class_logits
from gptjax.model.gpt import apply
from gptjax.tree import num_params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model, write_chat_template

NUM_CHECK_TOKENS = 16
# Relative to the largest logit: float32 rounding is 6e-8 per sum, of some hundred sums.
EXPORT_TOLERANCE = 1e-5
EXPORT_WRITERS: dict[str, Callable[[Model, Path], None]] = {"hf": write_hf, "book": write_book}


def export_model(model: Model, layout: str, output_dir: Path) -> str:
    """Exports the model and verifies the result; returns a summary for the user.

    `output_dir` must not exist yet, or be empty; it is created only after verification.
    """
    if layout not in EXPORT_WRITERS:
        raise ConfigError(
            f"cannot export to {layout!r}.{did_you_mean(layout, EXPORT_WRITERS)} "
            f"Known: {', '.join(EXPORT_WRITERS)}."
        )
    try:
        with atomic_path(output_dir) as new_dir:
            if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
                raise ModelError(f"{output_dir} already exists. Choose another folder with --out.")
            new_dir.mkdir()
            EXPORT_WRITERS[layout](model, new_dir)
            model.tokenizer.save(new_dir)
            if model.chat_template:
                write_chat_template(model.chat_template, new_dir)
            reloaded = load(new_dir)
            difference = compare_logits(model, reloaded)
    except OSError as error:
        raise ModelError(f"cannot write {output_dir}: {error}. Choose another.") from error
    lost = ", ".join(list_differences(model, reloaded))
    return (
        f"wrote    {output_dir} ({layout}): {num_params(model.params):,} parameters; "
        f"logits of the reloaded model differ by at most {difference:.3g}"
    ) + (f"\nnot exported: {lost}" if lost else "")


def list_differences(model: Model, reloaded: Model) -> list[str]:
    """Names the fields of a model, except parameters, that the reloaded one lacks."""

    def parts(m: Model) -> dict[str, Any]:
        values = {field.name: getattr(m, field.name) for field in dataclasses.fields(m)}
        values |= {f"model.{n}": v for n, v in dataclasses.asdict(values.pop("config")).items()}
        return values | {"tokenizer": m.tokenizer.hash, "params": None}

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
