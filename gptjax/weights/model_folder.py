"""Model and model folder, which every command accepts as MODEL.

config.json          model config, format version, tokenizer hash, labels, columns, step
model.safetensors    float32 parameters by name
vocab.json, merges.txt, tokenizer_config.json; or tokenizer.json, tokenizer_config.json
chat_template.jinja  of an assistant
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig
from gptjax.errors import ModelError, check_type
from gptjax.fileio import strict_json
from gptjax.fileio.atomic import atomic_path, write_atomic
from gptjax.fileio.paths import user_path
from gptjax.model.gpt import check_params, compute_dtype
from gptjax.model.lora import Adapters
from gptjax.model.quantization import prepare_decode_params, unstack_layers
from gptjax.tokenizer.chat_template import CHAT_TEMPLATE_FILE as TEMPLATE
from gptjax.tokenizer.chat_template import compile_template
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.tokenizer.vocab_files import TOKENIZER_CONFIG, TOKENIZER_JSON
from gptjax.tree import Params, flatten_with_names, num_params, unflatten_names
from gptjax.weights.safetensors import is_finite, open_safetensors, read_finite, write_safetensors

MODEL_FORMAT = "gptjax-1"
SAVED_FILES = {
    "config.json",
    "model.safetensors",
    "vocab.json",
    "merges.txt",
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    TEMPLATE,
}
MAX_MODEL_JSON_BYTES = 10_000_000  # of a JSON file of a model


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained GPT with its tokenizer, labels and chat template."""

    config: GPTConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    labels: tuple[str, ...] = ()  # class names of a classifier
    chat_template: str = dataclasses.field(default="", repr=False)  # Jinja source
    int8: bool = False  # `fake_quantize`d parameters, int8 matmuls in decoding
    columns: tuple[str, ...] = ()  # of text and label in the table of a classifier

    @functools.cached_property
    def decode_params(self) -> Params:
        """Parameters in the layout for decoding, one array per layer; cached."""
        check_params(self.config, self.params)
        dtype = compute_dtype(self.config)
        with jax.ensure_compile_time_eval():  # inside `jit`, tracers would be cached
            return prepare_decode_params(unstack_layers(self.params), dtype, self.int8)

    def __str__(self) -> str:
        c = self.config
        return (
            f"GPT with {num_params(self.params):,} parameters: {c.n_layers} layers, "
            f"{c.n_heads} heads, width {c.d_model}, context {c.context_length}, "
            f"vocabulary {c.vocab_size:,} ({self.tokenizer.name})"
        )


def save(model: Model, model_dir: str | Path, *, step: int | None = None) -> None:
    """Writes the model folder, replacing the model of an existing one atomically.

    Without parameters, the folder completes the checkpoints of an unfinished run.
    `step` is the training step of the parameters, if it may not be the last.
    """
    check_type("model", model, Model, "Write save(model, folder).")
    if model.params:
        check_params(model.config, model.params)
    if len(model.labels) != model.config.n_classes:
        raise ModelError(
            f"labels={model.labels!r:.80} for model.n_classes={model.config.n_classes}. Give each "
            "class one label."
        )
    folder = user_path(model_dir)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(names - SAVED_FILES)
    if others and not is_model_folder(folder):
        raise ModelError(
            f"{folder} has {others[0][:80]!r}, which is no file of a model. Choose another folder."
        )
    metadata: dict[str, Any] = {
        "format": MODEL_FORMAT,
        "model": dataclasses.asdict(model.config),
        "labels": list(model.labels),
        "columns": list(model.columns),
        "tokenizer": {"name": model.tokenizer.name, "hash": model.tokenizer.hash},
    }
    if step is not None:
        metadata["step"] = step
    try:
        with atomic_path(folder, replace_folder=True) as new_dir:
            new_dir.mkdir()
            if model.params:
                _write_leaves(model.params, new_dir / "model.safetensors")
            model.tokenizer.save(new_dir)
            if model.chat_template:
                write_chat_template(model.chat_template, new_dir)
            write_model_json(metadata, new_dir / "config.json")
            for name in others:  # notes of a user, or what a file manager leaves
                if (folder / name).is_dir() and not (folder / name).is_symlink():
                    shutil.copytree(folder / name, new_dir / name, symlinks=True)
                else:
                    shutil.copy2(folder / name, new_dir / name, follow_symlinks=False)
    except OSError as error:
        raise ModelError(f"cannot write the model folder {model_dir}: {error}.") from error


def is_model_folder(folder: Path) -> bool:
    """True if the folder was written by `save`."""
    try:
        config = strict_json.read_json(folder / "config.json", MAX_MODEL_JSON_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == MODEL_FORMAT


def _write_leaves(params: Params, path: Path) -> None:
    """Writes a tree of parameters in float32 under their names; they must be finite."""
    # Contiguous, since the library ignores strides.
    leaves = {
        name: np.ascontiguousarray(leaf, np.float32)
        for name, leaf in flatten_with_names(params).items()
    }
    for name, leaf in leaves.items():
        if not is_finite(leaf):
            raise ModelError(
                f"{name} contains values that are non-finite in float32, which cannot be loaded "
                "again. Save earlier parameters, or retrain the model."
            )
    write_safetensors(leaves, path)


def write_model_json(content: dict[str, Any], path: Path) -> None:
    """Writes an indented JSON file of a model."""
    write_atomic(path, json.dumps(content, indent=2) + "\n", MAX_MODEL_JSON_BYTES)


def write_chat_template(source: str, model_dir: Path) -> None:
    """Writes a chat template under the file name that `transformers` uses."""
    write_atomic(model_dir / TEMPLATE, compile_template(source).source)


def save_adapters(adapters: Adapters, path: Path) -> None:
    """Writes scaled adapters, named after the parameters that they are added to."""
    try:
        with atomic_path(path) as new_path:
            _write_leaves(adapters, new_path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error}. Choose another.") from error


def load_adapters(path: Path) -> Adapters:
    """Reads a file of `save_adapters`, for `gptjax.apply` or `merge_adapters`."""
    reader = open_safetensors([path])
    for name in reader.tensors:
        if not name.startswith("blocks/") or not name.endswith(("/lora_a", "/lora_b")):
            raise ModelError(f"{path} has {name[:80]!r}, which is not an adapter.")
    leaves = {name: jnp.asarray(read_finite(reader, name, path)) for name in reader.tensors}
    return unflatten_names(leaves)
