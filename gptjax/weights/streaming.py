"""Reads parameters from files of any layout, one tensor at a time.

Host memory holds the parameters and one tensor of the file. On accelerators, arrays
are then moved to the device and released one by one.
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
from gptjax.tree import flatten_with_names
from gptjax.weights.names import (
    IGNORED_BUFFERS,
    EMBEDDING_TABLES,
    ParamSlot,
    param_slots,
    unpack_tensor,
    source_shape,
)

BUFFER_ALIGNMENT = 64  # bytes; JAX on CPU uses arrays of this alignment without copying


@runtime_checkable  # for the type checks of the tests
class TensorReader(Protocol):
    """Reads tensors by name, one at a time."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Values with `.shape` and `.dtype`, by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Model files of a known layout, whose parameters have not been read yet."""

    layout: str
    location: str  # for messages
    config: GPTConfig
    tokenizer: Tokenizer
    reader: TensorReader
    num_rows: int  # in the file's token embedding, at least vocab_size
    labels: tuple[str, ...] = ()  # class names of a classifier
    chat_template: str = ""  # of an assistant; "" if none


def read_params(source: ModelSource) -> Params:
    """Reads the parameters in float32.

    Raises:
        ModelError: a tensor is missing, unexpected, of the wrong shape or dtype, or
            not finite.
    """
    config, reader = source.config, source.reader
    check_config_sizes(source)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = flatten_with_names(shapes)
    slots_by_name = param_slots(config, source.layout, leaves)
    full_names = match_names(source, slots_by_name)
    arrays = {name: aligned_empty(leaf.shape) for name, leaf in leaves.items()}
    for name, slots in slots_by_name.items():
        tensor = reader.read(full_names[name])
        # Tests all values without allocating a mask: min and max propagate nan.
        if not np.isfinite([tensor.min(), tensor.max()]).all():
            raise ModelError(
                f"{source.location}: {full_names[name]} contains non-finite values. "
                "Copy the file again, or retrain the model."
            )
        if slots[0].leaf in EMBEDDING_TABLES:
            tensor = tensor[: leaves[slots[0].leaf].shape[0]]
        for leaf, layer, values in unpack_tensor(tensor, slots):
            target = arrays[leaf] if layer is None else arrays[leaf][layer]
            target.reshape(values.shape)[...] = values
    ordered = [jax.device_put(arrays.pop(name)) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), ordered)


def check_config_sizes(source: ModelSource) -> None:
    """Rejects configs larger than the file, before any memory is allocated."""
    c, tensors = source.config, source.reader.tensors
    max_axis = max(
        [len(tensors), *(n for entry in tensors.values() for n in entry.shape)]
    )
    stack_lengths = [
        e.shape[0] for n, e in tensors.items() if n[:7] == "blocks/" and e.shape
    ]
    # Each layer has tensors of its own or a row of a stacked tensor.
    max_layers = max([len(tensors), *stack_lengths])
    for name in ("vocab_size", "context_length", "n_layers", "n_heads", "d_model"):
        if getattr(c, name) > (max_layers if name == "n_layers" else max_axis):
            raise ModelError(
                f"{source.location}: {name}={getattr(c, name)} is too large for "
                f"{len(tensors)} tensors with axes of up to {max_axis}. Correct the config "
                "or copy the files again."
            )


def match_names(
    source: ModelSource, slots_by_name: Mapping[str, list[ParamSlot]]
) -> dict[str, str]:
    """Maps each expected name to its name in the file; checks shapes and dtypes."""
    full_names: dict[str, str] = {}
    for full in source.reader.tensors:
        short = full.removeprefix("transformer.") if source.layout == "hf" else full
        if short in full_names:
            raise ModelError(
                f"{source.location} has both {full_names[short]} and {full}. Remove one."
            )
        full_names[short] = full
    tied = {"lm_head.weight", "out_head.weight"} if source.config.tie_embeddings else {}
    unexpected = [
        n
        for n in full_names
        if n not in slots_by_name and not IGNORED_BUFFERS.fullmatch(n)
    ]
    unexpected = sorted(set(unexpected) - set(tied))
    if missing := sorted(set(slots_by_name) - set(full_names)):
        raise ModelError(
            f"{source.location} lacks {len(missing)} tensors that its config requires, "
            f"such as {missing[0]}. Copy the files again or correct the config."
        )
    if unexpected:
        raise ModelError(
            f"{source.location} has {len(unexpected)} unexpected tensors, such as "
            f"{unexpected[0][:80]}. Remove them or correct the config."
        )
    for name, slots in slots_by_name.items():
        info, expected = source.reader.tensors[full_names[name]], source_shape(slots)
        if slots[0].leaf in EMBEDDING_TABLES:
            expected = (source.num_rows, *expected[1:])
        found = tuple(info.shape)
        if source.layout == "openai" and found[:1] == (1,) and len(found) == 3:
            found = found[1:]  # OpenAI stores matrices as width-1 convolutions
        if found != expected or not is_float(info.dtype):
            raise ModelError(
                f"{source.location}: {full_names[name]} is {info.dtype} {found}, but the "
                f"config requires floating point {expected}. Copy the files again or "
                "correct the config."
            )
    return full_names


def is_float(dtype: np.dtype) -> bool:
    """True for floating point, including bfloat16, which is of NumPy kind "V"."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an empty float32 array that JAX can use on CPU without copying."""
    size = int(np.prod(shape)) * 4
    buffer = np.empty(size + BUFFER_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % BUFFER_ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)
