"""Adapters in a file of their own: a few megabytes beside the model they belong to."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gptjax.errors import ModelError
from gptjax.lora import Adapters
from gptjax.tree import named_leaves
from gptjax.weights.folder import write_tensors
from gptjax.weights.tensors import open_safetensors


def save_adapters(adapters: Adapters, path: Path) -> None:
    """Writes adapters, already scaled, under the names of what they are added to.

    Raises:
        ModelError: the file cannot be written.
    """
    arrays = {
        name: np.ascontiguousarray(leaf)
        for name, leaf in named_leaves(adapters).items()
    }
    part = path.with_name(path.name + ".part")
    try:
        write_tensors(arrays, part)
        part.replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error}. Name another.") from error


def load_adapters(path: Path) -> Adapters:
    """What `save_adapters` wrote: for `gptjax.apply`, or `gptjax.lora.merged`.

    Raises:
        ModelError: the file is damaged or holds something else.
    """
    files = open_safetensors([path])
    adapters: Adapters = {}
    for name in files.tensors:
        first, *middle, last = name.split("/")
        if first != "blocks" or last not in ("lora_a", "lora_b"):
            raise ModelError(f"{path} has {name[:80]!r}, which is no adapter.")
        place = adapters
        for key in (first, *middle):
            place = place.setdefault(key, {})
        place[last] = jnp.asarray(files.read(name))
    return adapters
