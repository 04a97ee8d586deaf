"""A model and its portable form: a folder that every command accepts as MODEL.

config.json         shape of the model, format, hash of the tokenizer
model.safetensors   parameters under their names, float32
vocab.json, merges.txt, tokenizer_config.json
chat_template.jinja  of an assistant
"""

import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

from gptjax.config import GPTConfig
from gptjax.errors import ModelError
from gptjax.model import Params, compute_dtype
from gptjax.packing import packed, unstack
from gptjax.template import FILE as TEMPLATE
from gptjax.tokenizer import Tokenizer
from gptjax.tree import count, named_leaves

FORMAT = "gptjax-1"


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained GPT and what it takes to use it."""

    config: GPTConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    labels: tuple[str, ...] = ()  # of a classifier, by class
    template: str = dataclasses.field(default="", repr=False)  # of an assistant, Jinja
    int8: bool = False  # whether parameters are `rounded`, and read in 8 bits to write

    @functools.cached_property
    def layers(self) -> Params:
        """The parameters as decoding wants them: one array per layer, made once."""
        dtype = compute_dtype(self.config)
        return packed(unstack(self.params), dtype, self.int8)

    def __str__(self) -> str:
        c = self.config
        return (
            f"GPT with {count(self.params):,} parameters: {c.n_layers} layers, "
            f"{c.n_heads} heads, width {c.d_model}, context {c.context_length}, "
            f"vocabulary {c.vocab_size:,} ({self.tokenizer.name})"
        )


def save(model: Model, folder: str | Path) -> None:
    """Writes the model folder; a folder that is there already is replaced whole."""
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}-"
        ) as temporary:
            write_files(model, Path(temporary) / "new")
            old = Path(temporary) / "old"
            if folder.exists():
                os.replace(folder, old)
            os.replace(Path(temporary) / "new", folder)
    except OSError as error:
        raise ModelError(f"cannot write the model folder {folder}: {error}.") from error


def write_files(model: Model, folder: Path) -> None:
    """Writes the files of a model folder into a new folder."""
    folder.mkdir()
    arrays = {
        name: np.ascontiguousarray(leaf, np.float32)  # safetensors ignores strides
        for name, leaf in named_leaves(model.params).items()
    }
    write_tensors(arrays, folder / "model.safetensors")
    model.tokenizer.save(folder)
    if model.template:
        write_template(model.template, folder)
    about = {
        "format": FORMAT,
        "model": dataclasses.asdict(model.config),
        "labels": list(model.labels),
        "tokenizer": {"name": model.tokenizer.name, "hash": model.tokenizer.hash},
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def write_template(source: str, folder: Path) -> None:
    """Writes a chat template where `transformers` looks for it too."""
    with (folder / TEMPLATE).open("w", encoding="utf-8", newline="") as file:
        file.write(source)


def write_tensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file that PyTorch's tools take, and others may read."""
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    path.chmod(0o644)  # the library leaves it to its owner alone
