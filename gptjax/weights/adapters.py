"""LoRA adapter files: a few megabytes, stored without the base model."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gptjax.errors import ModelError
from gptjax.lora import Adapters
from gptjax.tree import flatten_with_names
from gptjax.weights.folder import write_safetensors
from gptjax.weights.tensors import open_safetensors


def save_adapters(adapters: Adapters, path: Path) -> None:
    """Writes scaled adapters, named after the parameters that they are added to.

    Raises:
        ModelError: the file cannot be written.
    """
    arrays = {
        name: np.ascontiguousarray(leaf)
        for name, leaf in flatten_with_names(adapters).items()
    }
    partial_path = path.with_name(path.name + ".part")
    try:
        write_safetensors(arrays, partial_path)
        partial_path.replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error}. Choose another.") from error


def load_adapters(path: Path) -> Adapters:
    """Reads a file of `save_adapters`, for `gptjax.apply` or `merge_adapters`.

    Raises:
        ModelError: the file is damaged or contains other tensors.
    """
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
