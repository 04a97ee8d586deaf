"""Model and model folder, which every command accepts as MODEL.

config.json          model config, format version, tokenizer hash, labels
model.safetensors    float32 parameters by name
vocab.json, merges.txt, tokenizer_config.json
chat_template.jinja  of an assistant
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gptjax.config import GPTConfig
from gptjax.errors import ModelError
from gptjax.fileio.atomic import atomic_path
from gptjax.model.gpt import compute_dtype
from gptjax.model.lora import Adapters
from gptjax.model.quantization import prepare_decode_params, unstack_layers
from gptjax.tokenizer.chat_template import CHAT_TEMPLATE_FILE as TEMPLATE
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.tree import Params, flatten_with_names, num_params
from gptjax.weights.safetensors import open_safetensors

MODEL_FORMAT = "gptjax-1"


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained GPT with its tokenizer, labels and chat template."""

    config: GPTConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    labels: tuple[str, ...] = ()  # class names of a classifier
    chat_template: str = dataclasses.field(default="", repr=False)  # Jinja source
    int8: bool = False  # `fake_quantize`d parameters, int8 matmuls in decoding

    @functools.cached_property
    def decode_params(self) -> Params:
        """Parameters in the layout for decoding, one array per layer; cached."""
        dtype = compute_dtype(self.config)
        return prepare_decode_params(unstack_layers(self.params), dtype, self.int8)

    def __str__(self) -> str:
        c = self.config
        return (
            f"GPT with {num_params(self.params):,} parameters: {c.n_layers} layers, "
            f"{c.n_heads} heads, width {c.d_model}, context {c.context_length}, "
            f"vocabulary {c.vocab_size:,} ({self.tokenizer.name})"
        )


def save(model: Model, model_dir: str | Path) -> None:
    """Writes the model folder, replacing an existing one atomically."""
    arrays = {
        name: np.ascontiguousarray(leaf, np.float32)  # safetensors ignores strides
        for name, leaf in flatten_with_names(model.params).items()
    }
    _replace_folder(model, Path(model_dir), arrays)


def save_without_params(model: Model, model_dir: Path) -> None:
    """Writes the files that a run's checkpoints need to be loaded as a model."""
    _replace_folder(model, model_dir, {})


def _replace_folder(model: Model, model_dir: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the model folder, replacing an existing one atomically."""
    metadata = {
        "format": MODEL_FORMAT,
        "model": dataclasses.asdict(model.config),
        "labels": list(model.labels),
        "tokenizer": {"name": model.tokenizer.name, "hash": model.tokenizer.hash},
    }
    try:
        with atomic_path(model_dir, replace_folder=True) as new_dir:
            new_dir.mkdir()
            if arrays:
                write_safetensors(arrays, new_dir / "model.safetensors")
            model.tokenizer.save(new_dir)
            if model.chat_template:
                write_chat_template(model.chat_template, new_dir)
            (new_dir / "config.json").write_text(json.dumps(metadata, indent=2) + "\n")
    except OSError as error:
        raise ModelError(f"cannot write the model folder {model_dir}: {error}.") from error


def write_chat_template(source: str, model_dir: Path) -> None:
    """Writes a chat template under the file name that `transformers` uses."""
    with (model_dir / TEMPLATE).open("w", encoding="utf-8", newline="") as file:
        file.write(source)


def write_safetensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file marked as PyTorch's, readable by all users."""
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    path.chmod(0o644)  # the library creates it with mode 0600


def save_adapters(adapters: Adapters, path: Path) -> None:
    """Writes scaled adapters, named after the parameters that they are added to."""
    arrays = {
        name: np.ascontiguousarray(leaf) for name, leaf in flatten_with_names(adapters).items()
    }
    try:
        with atomic_path(path) as new_path:
            write_safetensors(arrays, new_path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error}. Choose another.") from error


def load_adapters(path: Path) -> Adapters:
    """Reads a file of `save_adapters`, for `gptjax.apply` or `merge_adapters`."""
    reader = open_safetensors([path])
    adapters: Adapters = {}
    for name in reader.tensors:
        first, *middle, last = name.split("/")
        if first != "blocks" or last not in ("lora_a", "lora_b"):
            raise ModelError(f"{path} has {name[:80]!r}, which is not an adapter.")
        subtree = adapters
        for key in (first, *middle):
            subtree = subtree.setdefault(key, {})
        subtree[last] = jnp.asarray(reader.read(name))
    return adapters
