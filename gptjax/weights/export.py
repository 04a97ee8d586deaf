"""Exports models in formats that other tools load.

hf    Hugging Face GPT-2 (transformers, llama.cpp's converter, vLLM, ...)
book  state dict of the book's PyTorch GPTModel, whose output head is never tied

Every export is loaded again and must reproduce the logits before it is kept.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig, did_you_mean
from gptjax.errors import ConfigError, ModelError
from gptjax.fileio.atomic import atomic_path, write_atomic
from gptjax.model.classifier import class_logits
from gptjax.model.gpt import apply
from gptjax.tree import flatten_with_names, num_params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model, write_chat_template, write_model_json
from gptjax.weights.param_map import EMBEDDING_TABLES, pack_tensor, param_slots
from gptjax.weights.safetensors import write_safetensors

NUM_CHECK_TOKENS = 16
HF_HEAD_TENSORS = ("lm_head.weight", "score.weight")  # not prefixed by "transformer."
# Relative to the largest logit: float32 rounding is 6e-8 per sum, of some hundred sums.
EXPORT_TOLERANCE = 1e-5


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
    """Names of the parts of a model, but parameters, that the reloaded one lacks."""

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


def named_tensors(model: Model, layout: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a layout by name, without vocabulary padding."""
    c, (embedding_name, head_name) = model.config, EMBEDDING_TABLES
    leaves = {n: np.asarray(leaf) for n, leaf in flatten_with_names(model.params).items()}
    for name in {embedding_name, head_name} & set(leaves):
        leaves[name] = leaves[name][: c.vocab_size]
    if model.labels:
        leaves.pop(head_name, None)  # classifiers of transformers have no LM head
    if layout == "book" and c.tie_embeddings:
        leaves[head_name] = leaves[embedding_name]
    if layout == "hf" and not c.qkv_bias:  # GPT-2 requires them
        zeros = np.zeros((c.n_layers, c.n_heads, c.actual_head_dim), np.float32)
        for name in ("query", "key", "value"):
            leaves[f"blocks/attention/{name}/bias"] = zeros
    slots_by_name = param_slots(c, layout, leaves)
    return {name: pack_tensor(slots, leaves) for name, slots in slots_by_name.items()}


def hf_problem(config: GPTConfig) -> str:
    """Says why transformers cannot represent a classifier; "" if it can."""
    values = {"pool": "last", "head_bias": False, "causal": True}
    others = [f"model.{n}={v}" for n in values if (v := getattr(config, n)) != values[n]]
    return f"transformers has no classifiers with {', '.join(others)}" if others else ""


def write_hf(model: Model, folder: Path) -> None:
    """Writes all files that transformers needs, except those of the tokenizer."""
    c, eot = model.config, model.tokenizer.eot_token
    if model.labels and (problem := hf_problem(c)):
        raise ModelError(f"{problem}. Train one with pool='last', no head bias and causal=true.")
    hf_config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.context_length,
        "n_ctx": c.context_length,  # old name of n_positions, still read by some tools
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], c.dropout),
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
    }
    if model.labels:
        hf_config |= {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {str(n): label for n, label in enumerate(model.labels)},
            "label2id": {label: n for n, label in enumerate(model.labels)},
            "pad_token_id": eot,  # classifies the token before the first padding
        }
    arrays = named_tensors(model, "hf")
    prefixed = {
        name if name in HF_HEAD_TENSORS else f"transformer.{name}": array
        for name, array in arrays.items()
    }
    write_safetensors(prefixed, folder / "model.safetensors")
    write_model_json(hf_config, folder / "config.json")
    special_tokens = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_model_json(special_tokens, folder / "generation_config.json")
    write_atomic(folder / "README.md", model_card(model))


def write_book(model: Model, folder: Path) -> None:
    """Writes the state dict and the config dictionary of the book (GPT_CONFIG)."""
    c = model.config
    if model.labels:
        raise ModelError("the book's format stores no labels of a classifier. Use --to hf.")
    book_config = {
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "emb_dim": c.d_model,
        "n_heads": c.n_heads,
        "n_layers": c.n_layers,
        "drop_rate": c.dropout,
        "qkv_bias": c.qkv_bias,
    }
    write_safetensors(named_tensors(model, "book"), folder / "model.safetensors")
    write_model_json(book_config, folder / "config.json")


EXPORT_WRITERS: dict[str, Callable[[Model, Path], None]] = {"hf": write_hf, "book": write_book}


def model_card(model: Model) -> str:
    """Returns the model card (README.md) of an exported folder."""
    c = model.config
    task, auto_class, title = "text-generation", "AutoModelForCausalLM", "A GPT-2"
    if model.labels:
        task, auto_class = "text-classification", "AutoModelForSequenceClassification"
        title = f"A classifier ({', '.join(model.labels)}) on GPT-2"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [gpt2, gptjax]
---

# {title} with {num_params(model.params):,} parameters

{c.n_layers} layers, {c.n_heads} heads, width {c.d_model}, context {c.context_length},
{c.vocab_size:,} tokens ({model.tokenizer.name}). Written by gptjax.

```python
from transformers import AutoTokenizer, {auto_class}

model = {auto_class}.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```
"""
