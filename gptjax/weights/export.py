"""Exports models in formats that other tools load.

hf    Hugging Face GPT-2, Llama or Qwen 3 (for transformers, llama.cpp, vLLM, ...)
book  state dict of the book's PyTorch GPTModel, whose output head is never tied

Every export is loaded again and must reproduce the logits before it is kept.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig, did_you_mean
from gptjax.errors import ConfigError, ModelError
from gptjax.fileio.atomic import atomic_path, write_atomic
from gptjax.model.classifier import class_logits
from gptjax.model.gpt import apply
from gptjax.presets import LLAMA_OPTIONS
from gptjax.tree import flatten_with_names, num_params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model, write_chat_template, write_model_json
from gptjax.weights.param_map import (
    EMBEDDING_TABLES,
    HF_PREFIXES,
    hf_layout,
    pack_tensor,
    param_slots,
)
from gptjax.weights.safetensors import write_safetensors

NUM_CHECK_TOKENS = 16
HF_HEAD_TENSORS = ("lm_head.weight", "score.weight")  # without the prefix of the others


class HFArchitecture(NamedTuple):
    """Name of an architecture, and its classes in transformers."""

    name: str
    lm: str
    classifier: str


HF_ARCHITECTURES = {  # by model_type
    "gpt2": HFArchitecture("GPT-2", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "llama": HFArchitecture("Llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "qwen3": HFArchitecture("Qwen 3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
}
# Options that an architecture determines.
GPT2_OPTIONS: dict[str, Any] = {
    **{"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True},
    **{"qk_norm": False, "causal": True},
}
LLAMA_VALUES = {n: (value,) for n, value in (LLAMA_OPTIONS | {"causal": True}).items()}
CLASSIFIER_VALUES = {"pool": ("last",), "head_bias": (False,)}
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


def gpt2_values(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """Returns the values that options of a GPT-2 of this size can have."""
    values = {n: (value,) for n, value in GPT2_OPTIONS.items()}
    head_dim = config.d_model / config.n_heads
    return values | {"n_kv_heads": (0, config.n_heads), "head_dim": (0, head_dim)}


def hf_model_type(config: GPTConfig) -> str:
    """Returns the key in `HF_ARCHITECTURES` of the most similar architecture."""
    if hf_layout(config) == "hf":
        return "gpt2"
    return "qwen3" if config.qk_norm else "llama"


def hf_problem(config: GPTConfig, is_classifier: bool) -> str:
    """Says why transformers cannot represent a model; "" if it can."""
    model_type = hf_model_type(config)
    values = gpt2_values(config) if model_type == "gpt2" else LLAMA_VALUES
    values = values | (CLASSIFIER_VALUES if is_classifier else {})
    return unsupported_options(config, values, f"{HF_ARCHITECTURES[model_type].name} models")


def unsupported_options(
    config: GPTConfig, values: Mapping[str, tuple[Any, ...]], models: str
) -> str:
    """Says which options have none of the values of a format; "" if all do."""
    found = {name: getattr(config, name) for name in values}
    others = [
        f"model.{n}={value} (only {values[n][0]})"
        for n, value in found.items()
        if value not in values[n]
    ]
    return f"{models} of this format do not have {', '.join(others)}" if others else ""


def gpt2_json(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys that a config.json of a GPT-2 has."""
    return {
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # old name of n_positions, still read by some tools
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_dim or None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], config.dropout),
    }


def llama_json(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys that a config.json of a Llama or Qwen 3 has."""
    scaling = None
    if config.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.actual_mlp_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.actual_kv_heads,
        "head_dim": config.actual_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
        # Names of transformers 4, which later versions and other tools read as well.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def lossless_dtype(arrays: Iterable[np.ndarray]) -> str:
    """Returns bfloat16 if it represents all values exactly, else float32."""
    is_exact = all(not (array.view(np.uint32) & 0xFFFF).any() for array in arrays)
    return "bfloat16" if is_exact else "float32"


def write_hf(model: Model, folder: Path) -> None:
    """Writes all files that transformers needs, except those of the tokenizer."""
    c, tokenizer = model.config, model.tokenizer
    model_type = hf_model_type(c)
    is_gpt2, architecture = model_type == "gpt2", HF_ARCHITECTURES[model_type]
    if problem := hf_problem(c, bool(model.labels)):
        raise ModelError(f"{problem}. Train a model with other options.")
    arrays = named_tensors(model, hf_layout(c))
    eot, stop_ids = tokenizer.eot_token, tokenizer.stop_ids
    special_tokens = {
        "bos_token_id": eot if tokenizer.bos_token is None else tokenizer.bos_token,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else eot,
    }
    # As in the public files: Llama's and Qwen's are bfloat16, GPT-2's are float32.
    dtype = "float32" if is_gpt2 else lossless_dtype(arrays.values())
    hf_config = {
        "architectures": [architecture.classifier if model.labels else architecture.lm],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        **(gpt2_json(c) if is_gpt2 else llama_json(c)),
        "tie_word_embeddings": c.tie_embeddings,
        **special_tokens,
        "dtype": dtype,
    }
    if model.labels:
        hf_config |= {
            "id2label": {str(n): label for n, label in enumerate(model.labels)},
            "label2id": {label: n for n, label in enumerate(model.labels)},
            "pad_token_id": eot,  # classifies the token before the first padding
        }
    prefix = HF_PREFIXES[hf_layout(c)]
    prefixed = {
        name if name in HF_HEAD_TENSORS else prefix + name: array.astype(dtype, copy=False)
        for name, array in arrays.items()
    }
    write_safetensors(prefixed, folder / "model.safetensors")
    write_model_json(hf_config, folder / "config.json")
    write_model_json(special_tokens | {"pad_token_id": eot}, folder / "generation_config.json")
    write_atomic(folder / "README.md", model_card(model, architecture.name, model_type))


def write_book(model: Model, folder: Path) -> None:
    """Writes the state dict and the config dictionary of the book (GPT_CONFIG)."""
    c = model.config
    if model.labels:
        raise ModelError("the book's format stores no labels of a classifier. Use --to hf.")
    sizes = {"mlp_dim": (0, 4 * c.d_model), "norm_eps": (1e-5,)}
    if problem := unsupported_options(c, gpt2_values(c) | sizes, "GPT-2 models"):
        raise ModelError(f"{problem}. Train a model with other options.")
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


def model_card(model: Model, architecture: str, model_type: str) -> str:
    """Returns the model card (README.md) of an exported folder."""
    c = model.config
    task, auto_class, title = "text-generation", "AutoModelForCausalLM", f"A {architecture}"
    if model.labels:
        task, auto_class = "text-classification", "AutoModelForSequenceClassification"
        title = f"A classifier ({', '.join(model.labels)}) on {architecture}"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [{model_type}, gptjax]
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
