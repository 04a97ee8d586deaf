"""From a model to a folder that other tools load as it is.

hf    Hugging Face's GPT-2 (transformers, llama.cpp's converter, vLLM, ...)
book  the state dict of the book's PyTorch GPTModel, whose head is never tied

Every export is read back and has to give the same logits before it counts.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.classifier import class_logits
from gptjax.config import suggestion
from gptjax.errors import ConfigError, ModelError
from gptjax.model import apply
from gptjax.tree import count, named_leaves
from gptjax.weights.folder import Model, write_template, write_tensors
from gptjax.weights.importing import load
from gptjax.weights.names import TABLES, give, homes

CHECK_TOKENS = 16
HEADS = ("lm_head.weight", "score.weight")  # not part of their "transformer"
ROUNDING = 1e-5  # of the largest logit; float32 has 6e-8 for each of some hundred sums


def export(model: Model, layout: str, folder: Path) -> str:
    """Writes the model for others into `folder`, which appears when it is checked.

    Args:
        model: from `gptjax.load`.
        layout: "hf" or "book".
        folder: must not be there yet, or be empty.

    Returns:
        A line that says what was written and checked.

    Raises:
        ConfigError: there is no such layout.
        ModelError: the folder is taken, cannot be written, or what was written does
            not compute the same.
    """
    if layout not in WRITERS:
        raise ConfigError(
            f"cannot export to {layout!r}.{suggestion(layout, WRITERS)} "
            f"Known: {', '.join(WRITERS)}."
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelError(f"{folder} is there already. Name another with --out.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}-"
        ) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            WRITERS[layout](model, new)
            model.tokenizer.save(new)
            if model.template:
                write_template(model.template, new)
            difference = compare(model, load(new))
            if folder.exists():
                folder.rmdir()
            os.replace(new, folder)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error}. Name another.") from error
    return (
        f"wrote    {folder} ({layout}): {count(model.params):,} parameters; read back, "
        f"its logits differ by {difference:.3g} at most"
    )


def compare(model: Model, again: Model) -> float:
    """The largest difference of their logits on a fixed row of tokens.

    Raises:
        ModelError: the models are not the same.
    """
    length = min(CHECK_TOKENS, model.config.context_length)
    rng = np.random.default_rng(0)
    token_BT = jnp.asarray(rng.integers(model.config.vocab_size, size=(1, length)))
    length_B = jnp.array([length // 2 + 1])
    ours, theirs = (
        class_logits(m.config, m.params, token_BT, length_B)
        if model.labels
        else apply(m.config, m.params, token_BT)[..., : model.config.vocab_size]
        for m in (model, again)
    )
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    # Without the padding of the vocabulary, the same sums may round otherwise.
    if not difference <= ROUNDING * float(np.abs(ours).max()):  # also refuses nan
        raise ModelError(
            f"what was written computes other logits, by up to {difference}. Nothing "
            "was kept; this is a fault of gptjax: please report it with the model."
        )
    return difference


def tensors(model: Model, layout: str) -> dict[str, np.ndarray]:
    """All tensors by the names of a layout, without rows that pad the vocabulary."""
    c, (table, head) = model.config, TABLES
    leaves = {n: np.asarray(leaf) for n, leaf in named_leaves(model.params).items()}
    for name in {table, head} & set(leaves):
        leaves[name] = leaves[name][: c.vocab_size]
    if model.labels:
        leaves.pop(head, None)  # their classifiers predict no tokens
    if layout == "book" and c.tie_embeddings:
        leaves[head] = leaves[table]
    if layout == "hf" and not c.qkv_bias:  # GPT-2 has them, so they are 0
        zeros = np.zeros((c.n_layers, c.n_heads, c.head_width), np.float32)
        for name in ("query", "key", "value"):
            leaves[f"blocks/attention/{name}/bias"] = zeros
    plan = homes(c, layout, leaves)
    return {name: give(filled, leaves) for name, filled in plan.items()}


def write_hf(model: Model, folder: Path) -> None:
    """Everything that transformers wants but the tokenizer.

    Raises:
        ModelError: a classifier that transformers has no name for.
    """
    c, eot = model.config, model.tokenizer.eot
    if model.labels and (c.pool != "last" or c.head_bias or not c.causal):
        raise ModelError(
            f"a classifier with model.pool={c.pool!r}, model.head_bias={c.head_bias} "
            f"and model.causal={c.causal} is none that transformers has: it needs "
            "pool='last', no bias, and causal attention. Train one like that."
        )
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.context_length,
        "n_ctx": c.context_length,  # its name before, which other tools read
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
        about |= {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {str(n): label for n, label in enumerate(model.labels)},
            "label2id": {label: n for n, label in enumerate(model.labels)},
            "pad_token_id": eot,  # the row ends before the first one
        }
    arrays = tensors(model, "hf")
    prefixed = {
        name if name in HEADS else f"transformer.{name}": array
        for name, array in arrays.items()
    }
    write_tensors(prefixed, folder / "model.safetensors")
    write_json(folder / "config.json", about)
    ends = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_json(folder / "generation_config.json", ends)
    (folder / "README.md").write_text(model_card(model), encoding="utf-8")


def write_book(model: Model, folder: Path) -> None:
    """The state dict, and the dictionary that the book calls GPT_CONFIG.

    Raises:
        ModelError: the model is a classifier.
    """
    c = model.config
    if model.labels:
        raise ModelError(
            "a classifier cannot be exported to the book's names, which have no place "
            "for its labels. Use --to hf."
        )
    about = {
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "emb_dim": c.d_model,
        "n_heads": c.n_heads,
        "n_layers": c.n_layers,
        "drop_rate": c.dropout,
        "qkv_bias": c.qkv_bias,
    }
    write_tensors(tensors(model, "book"), folder / "model.safetensors")
    write_json(folder / "config.json", about)


WRITERS: dict[str, Callable[[Model, Path], None]] = {"hf": write_hf, "book": write_book}


def write_json(path: Path, about: dict[str, Any]) -> None:
    """A JSON file for people and programs."""
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def model_card(model: Model) -> str:
    """The README.md of an exported folder."""
    c = model.config
    task, auto, what = "text-generation", "AutoModelForCausalLM", "A GPT-2"
    if model.labels:
        task, auto = "text-classification", "AutoModelForSequenceClassification"
        what = f"A classifier ({', '.join(model.labels)}) on GPT-2"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [gpt2, gptjax]
---

# {what} of {count(model.params):,} parameters

{c.n_layers} layers, {c.n_heads} heads, width {c.d_model}, context {c.context_length},
{c.vocab_size:,} tokens ({model.tokenizer.name}). Written by gptjax.

```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```
"""
