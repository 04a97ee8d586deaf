"""The portable form of a model: a folder that every command accepts as MODEL.

config.json         shape of the model, format, hash of the tokenizer
model.safetensors   parameters under their names, float32
vocab.json, merges.txt, tokenizer_config.json
"""

import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from gptjax import tokenizer as tokenizers
from gptjax.config import PRESETS, GPTConfig, build
from gptjax.errors import GptjaxError, ModelError
from gptjax.model import Params, init, unstack
from gptjax.tokenizer import Tokenizer
from gptjax.tree import count, named_leaves

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained GPT and what it takes to use it."""

    config: GPTConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)

    @functools.cached_property
    def layers(self) -> Params:
        """The parameters as decoding wants them: one array per layer, made once."""
        return unstack(self.config, self.params)

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
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    model.tokenizer.save(folder)
    about = {
        "format": f"gptjax-{FORMAT}",
        "model": dataclasses.asdict(model.config),
        "tokenizer": {"name": model.tokenizer.name, "hash": model.tokenizer.hash},
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def load(name: str | Path) -> Model:
    """The model in a model folder or in a run folder that holds one.

    Raises:
        ModelError: nothing of that name, or files that are damaged or do not agree.
    """
    folder = Path(name)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(missing(str(name), folder))
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if about.get("format") != f"gptjax-{FORMAT}":
            raise ModelError(
                f"{folder / 'config.json'} has format {about.get('format')!r}, but "
                f"this version reads 'gptjax-{FORMAT}'. Name a folder that "
                "gptjax.save or gptjax train wrote."
            )
        config = build(GPTConfig, about["model"], "model.")
        tokenizer = tokenizers.load(folder)
        if tokenizer.hash != about["tokenizer"]["hash"]:
            raise ModelError(
                f"the tokenizer in {folder} has hash {tokenizer.hash[:12]}, but the "
                f"model was trained with {about['tokenizer']['hash'][:12]}. Put its "
                "own tokenizer files back."
            )
        arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    except ModelError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        GptjaxError,
        safetensors.SafetensorError,
    ) as error:
        raise ModelError(
            f"cannot read the model folder {folder}: {error!r}. Write it again, or "
            "name another."
        ) from error
    tokenizer = dataclasses.replace(tokenizer, name=about["tokenizer"]["name"])
    return Model(config, filled(config, arrays, folder), tokenizer)


def filled(config: GPTConfig, arrays: dict[str, np.ndarray], folder: Path) -> Params:
    """The parameter tree of `config`, every leaf from the array of its name."""
    import jax

    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = named_leaves(shapes)
    if set(leaves) != set(arrays):
        wrong = sorted(set(leaves) ^ set(arrays))[:3]
        raise ModelError(
            f"{folder / 'model.safetensors'} does not hold the parameters that its "
            f"config.json describes: {wrong} are missing or too many. Write the "
            "model folder again."
        )
    for name, leaf in leaves.items():
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            raise ModelError(
                f"{name} in {folder / 'model.safetensors'} is {arrays[name].dtype} "
                f"{arrays[name].shape}, but config.json needs {leaf.dtype} "
                f"{leaf.shape}. Write the model folder again."
            )
    ordered = [jax.numpy.asarray(arrays[name]) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def missing(name: str, folder: Path) -> str:
    """What to say where MODEL names nothing that can be loaded."""
    if name in PRESETS:
        return (
            f"the public weights of {name} cannot be loaded by this version. Name a "
            "run folder or a model folder."
        )
    if (folder / "checkpoints").is_dir():
        return (
            f"the run {name} has no model/ yet, it is written when the run ends. "
            f"Finish it: gptjax train {folder / 'config.toml'} --run {folder}"
        )
    what = "has no config.json" if folder.is_dir() else "is not a folder"
    return (
        f"no model {name!r}: it {what}. Name a run folder (gptjax train ... --run "
        "DIR) or a model folder (DIR/model)."
    )
