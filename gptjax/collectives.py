"""What a program sends between devices: read from its text, and by arithmetic.

XLA writes a loop once; what it sends counts as often as the loop turns.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gptjax.config import RunConfig
from gptjax.model import compute_dtype, init
from gptjax.sharding import STORED, letters_of, spec
from gptjax.tree import named_leaves

KINDS = {  # bytes that one device sends in a ring of n, per byte of the whole array
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n / n,
    "collective-permute": lambda n: 1.0,
}
BITS = {
    "pred": 8,
    "bf16": 16,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
}  # else the digits of the name
SHAPE = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}")
TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")


class Collective(NamedTuple):
    """One operation between devices."""

    kind: str
    bytes: int  # of the whole array: what is gathered, reduced or exchanged
    devices: int  # in each group
    times: int  # in one run of the program

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run, by a ring."""
        return self.times * self.bytes * KINDS[self.kind](self.devices)


def collectives(text: str) -> list[Collective]:
    """The operations between devices of a compiled program, in the order of its text.

    Args:
        text: `compiled.as_text()`.
    """
    times = turns(text)
    found: dict[Any, Collective] = {}
    where = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            where = match[1]
        match = re.search(r"= (.*?) ([a-z\-]+?)(-start)?\(", line)
        if not match or match[2] not in KINDS:
            continue
        kind, shapes = match[2], match[1]
        sizes = [size_of(*pair) for pair in SHAPE.findall(shapes)]
        devices = group_size(line)
        if devices < 2:
            continue
        if match[3] and kind == "all-gather":  # the start's result has its operands too
            sizes = sizes[len(sizes) // 2 :]
        if match[3] and kind == "collective-permute":  # and words for the hardware
            sizes = sizes[:1]
        whole = sum(sizes) * (devices if kind == "reduce-scatter" else 1)
        if where.startswith("all-reduce-scatter"):  # as TPU's compiler writes it
            kind = "reduce-scatter"
        if kind == "all-to-all" and not shapes.startswith("("):
            whole *= devices
        # TPU's compiler writes one that overlaps with other work in several pieces.
        channel = re.search(r"channel_id=(\d+)", line)
        name = (kind, channel[1], whole) if channel else len(found)
        found.setdefault(name, Collective(kind, whole, devices, times.get(where, 1)))
    return list(found.values())


def size_of(kind: str, shape: str) -> int:
    """Bytes of an array as XLA writes its type.

    >>> size_of("bf16", "8,128")
    2048
    """
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def group_size(line: str) -> int:
    """How many devices one operation connects; 1 where it says nothing of it."""
    if match := MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2 if "source_target_pairs" in line else 1


def loop_bounds(text: str) -> dict[str, int]:
    """The largest number that each computation has written in it.

    TPU's compiler does not say how often a loop turns: its condition compares with it.
    """
    bounds: dict[str, int] = {}
    where = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            where = match[1]
        elif match := re.search(r"= [us]32\[\]\S* constant\((\d+)\)", line):
            bounds[where] = max(bounds.get(where, 1), int(match[1]))
    return bounds


def turns(text: str) -> dict[str, int]:
    """How often each computation of a program runs."""
    callers: dict[str, list[tuple[str, int]]] = {}
    bounds, where = loop_bounds(text), ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            where = match[1]
            callers.setdefault(where, [])
            continue
        count, until = TRIPS.search(line), re.search(r"condition=%?([\w.\-]+)", line)
        trips = int(count[1]) if count else bounds.get(until[1], 1) if until else 1
        for key, names in re.findall(
            r"(body|condition|calls|to_apply|branch_computations|called_computations)="
            r"(\{[^}]*\}|%?[\w.\-]+)",
            line,
        ):
            each = trips if key in ("body", "condition") else 1
            for name in re.findall(r"[\w.\-]+", names):
                callers.setdefault(name, []).append((where, each))

    @functools.cache
    def times(name: str) -> int:
        return sum(times(caller) * each for caller, each in callers[name]) or 1

    return {name: times(name) for name in callers}


def expected_bytes(
    run: RunConfig,
    sizes: Sequence[int],
    itemsize: int | None = None,
    emulated: bool = False,
) -> dict[str, float]:
    """Bytes that one device sends in a pretraining step, by arithmetic, over rings.

    "weights": what "fsdp" splits is gathered where it is used; a layer's in the forward
    and again in the backward pass. "gradients" are summed over "data" and "fsdp".
    "activations" are what "tensor" sums of the residual stream: of each layer two in
    the forward and two in the backward pass, then what the embedding and the loss need.
    All of it for every micro-batch.

    Args:
        run: whose model is trained.
        sizes: of the mesh, as `gptjax.sharding.AXES`.
        itemsize: bytes of a weight or an activation in use; default: by `model.dtype`.
        emulated: on CPUs, where XLA sums whole what it could sum and split, and one by
            one what it could add first: both gradients of a table that is read at both
            ends of the model, and those of what query, key and value read.
    """
    c, (data, fsdp, tensor) = run.model, sizes
    size, micros = itemsize or compute_dtype(c).itemsize, max(run.train.accumulate, 1)
    gather, reduce = KINDS["all-gather"], KINDS["all-reduce"]
    summed = (reduce if emulated else gather)(fsdp) + reduce(data) / fsdp
    weights = gradients = 0.0
    shapes = jax.eval_shape(lambda: init(c, jax.random.key(0)))
    for name, leaf in named_leaves(shapes).items():
        letters = letters_of(name, leaf.ndim)
        axes = tuple(spec(letters, STORED))
        part = leaf.size / (tensor if "tensor" in axes else 1)
        wide, both = "embedding" in name, c.tie_embeddings and "token_embed" in name
        gradient = part * (4 if wide else size) * (2 if both and emulated else 1)
        if "fsdp" not in axes:
            gradients += gradient * reduce(data * fsdp)
            continue
        gradients += gradient * summed
        used = 2 * size if "N" in letters else size if "output" in name else 4
        used += size if both and size != 4 else 0  # at the other end as well
        weights += part * used * gather(fsdp)
    positions = run.data.batch_size / micros / data / fsdp * c.context_length
    again = 1 if c.remat == "full" else 0  # attention, in the backward pass
    sums = 2 + (4 if emulated else 2) + again
    stream = c.n_layers * sums * size + size + 4
    activations = positions * (c.d_model * stream + 3 * 4) * reduce(tensor)
    found = {"weights": weights, "gradients": gradients, "activations": activations}
    return {name: micros * each for name, each in found.items()}
