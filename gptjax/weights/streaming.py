"""From tensors of others to our parameters, one tensor at a time.

Host memory holds the parameters and one tensor of the file; where the parameters are
on another device, each array leaves the host as soon as it is complete.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from gptjax.config import GPTConfig
from gptjax.errors import ModelError
from gptjax.model import Params, init
from gptjax.tokenizer import Tokenizer
from gptjax.tree import named_leaves
from gptjax.weights.names import BUFFERS, TABLES, Home, homes, take, their_shape

ALIGNMENT = 64  # bytes; JAX on a CPU uses an array so aligned where it lies


@runtime_checkable  # for the type checks of the tests
class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Entries with `.shape` and `.dtype`."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of a known layout, of which no parameter has been read yet."""

    layout: str
    place: str  # for messages
    config: GPTConfig
    tokenizer: Tokenizer
    files: Tensors
    rows: int  # of the file's token table; those beyond the vocabulary are left out
    labels: tuple[str, ...] = ()  # of a classifier
    template: str = ""  # of an assistant


def read_params(source: Source) -> Params:
    """The parameters in float32.

    Raises:
        ModelError: a tensor is missing, superfluous, of another shape, no numbers, or
            holds one that is not finite.
    """
    config, files = source.config, source.files
    check_sizes(source)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = named_leaves(shapes)
    plan = homes(config, source.layout, leaves)
    names = named(source, plan)
    arrays = {name: aligned(leaf.shape) for name, leaf in leaves.items()}
    for name, filled in plan.items():
        tensor = files.read(names[name])
        # Of all numbers without a mask of them; both are nan if one is.
        if not np.isfinite([tensor.min(), tensor.max()]).all():
            raise ModelError(
                f"{source.place}: {names[name]} holds numbers that are not finite. "
                "Copy or train it again."
            )
        if filled[0].leaf in TABLES:
            tensor = tensor[: leaves[filled[0].leaf].shape[0]]
        for leaf, layer, values in take(tensor, filled):
            target = arrays[leaf] if layer is None else arrays[leaf][layer]
            target.reshape(values.shape)[...] = values
    ordered = [jax.device_put(arrays.pop(name)) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def check_sizes(source: Source) -> None:
    """Raises for sizes beyond all that the file has, before anything is counted."""
    c, tensors = source.config, source.files.tensors
    room = max([len(tensors), *(n for entry in tensors.values() for n in entry.shape)])
    stacks = [e.shape[0] for n, e in tensors.items() if n[:7] == "blocks/" and e.shape]
    layers = max([len(tensors), *stacks])  # each has tensors, or a row in a stack
    for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model"):
        if getattr(c, name) > (layers if name == "n_layers" else room):
            raise ModelError(
                f"{source.place}: {name}={getattr(c, name)} does not come from "
                f"{len(tensors)} tensors with axes of up to {room}. Correct its "
                "config, or copy the files again."
            )


def named(source: Source, plan: Mapping[str, list[Home]]) -> dict[str, str]:
    """The name in the file for each name of the plan, all tensors checked."""
    names: dict[str, str] = {}
    for full in source.files.tensors:
        short = full.removeprefix("transformer.") if source.layout == "hf" else full
        if short in names:
            raise ModelError(
                f"{source.place} has both {names[short]} and {full}. Remove one."
            )
        names[short] = full
    tied = {"lm_head.weight", "out_head.weight"} if source.config.tie_embeddings else {}
    spare = [n for n in names if n not in plan and not BUFFERS.fullmatch(n)]
    spare = sorted(set(spare) - set(tied))
    if missing := sorted(set(plan) - set(names)):
        raise ModelError(
            f"{source.place} lacks {len(missing)} tensors that its shape needs, such "
            f"as {missing[0]}. Copy the files again, or correct their config."
        )
    if spare:
        raise ModelError(
            f"{source.place} has {len(spare)} tensors that no GPT-2 of its shape has, "
            f"such as {spare[0][:80]}. Remove them, or correct the config."
        )
    for name, filled in plan.items():
        entry, need = source.files.tensors[names[name]], their_shape(filled)
        if filled[0].leaf in TABLES:
            need = (source.rows, *need[1:])
        found = tuple(entry.shape)
        if source.layout == "openai" and found[:1] == (1,) and len(found) == 3:
            found = found[1:]  # its matrices are convolutions of width 1
        if found != need or not is_float(entry.dtype):
            raise ModelError(
                f"{source.place}: {names[name]} is {entry.dtype} {found}, but the "
                f"config needs floating point {need}. Copy the files again, or "
                "correct their config."
            )
    return names


def is_float(dtype: np.dtype) -> bool:
    """Whether it is floating point, bfloat16 included, which is NumPy's kind "V"."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An array for float32 numbers that JAX need not copy on a CPU."""
    size = int(np.prod(shape)) * 4
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)
