"""Communication volume of a program: parsed from its HLO, or estimated.

HLO contains each loop body once; its collectives are multiplied by the trip count.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gptjax.config import RunConfig
from gptjax.model.gpt import compute_dtype, init
from gptjax.parallel.sharding import PARAM_RULES, logical_axes, logical_to_spec
from gptjax.tree import flatten_with_names

# Bytes sent per device in a ring of n devices, per byte of the full array.
RING_TRAFFIC_FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n / n,
    "collective-permute": lambda n: 1.0,
}
ARRAY_TYPE_PATTERN = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
COMPUTATION_PATTERN = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
MESH_GROUPS_PATTERN = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}")
TRIP_COUNT_PATTERN = re.compile(r"known_trip_count[^\d]*(\d+)")
CONSTANT_PATTERN = re.compile(r"= [us]32\[\]\S* constant\((\d+)\)")
CALL_PATTERN = re.compile(
    r"(body|condition|calls|to_apply|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


class Collective(NamedTuple):
    """Collective operation of a compiled program."""

    kind: str
    bytes: int  # of the full array that is gathered, reduced or exchanged
    devices: int  # per replica group
    trip_count: int  # executions per run of the program

    @property
    def bytes_sent(self) -> float:
        """Bytes sent per device and run, with ring algorithms."""
        return self.trip_count * self.bytes * RING_TRAFFIC_FACTORS[self.kind](self.devices)


def parse_collectives(text: str) -> list[Collective]:
    """Parses the collectives of `compiled.as_text()`, in program order."""
    _, *parts = COMPUTATION_PATTERN.split(text)  # name, lines, name, lines, ...
    computations = dict(zip(parts[::2], map(str.splitlines, parts[1::2]), strict=True))
    counts = trip_counts(computations)
    found: dict[Any, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            match = re.search(r"= (.*?) ([a-z\-]+?)(-start)?\(", line)
            devices = group_size(line)
            if not match or match[2] not in RING_TRAFFIC_FACTORS or devices < 2:
                continue
            shapes, kind, is_async = match.groups()
            sizes = [hlo_array_bytes(*pair) for pair in ARRAY_TYPE_PATTERN.findall(shapes)]
            if is_async and kind == "all-gather":  # the result includes the operands
                sizes = sizes[len(sizes) // 2 :]
            if is_async and kind == "collective-permute":  # and context words
                sizes = sizes[:1]
            is_split = kind == "all-to-all" and not shapes.startswith("(")
            size_bytes = sum(sizes) * (devices if kind == "reduce-scatter" or is_split else 1)
            if name.startswith("all-reduce-scatter"):  # of the TPU compiler
                kind = "reduce-scatter"
            # The TPU compiler splits one that overlaps with compute into several.
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1], size_bytes) if channel else len(found)
            found.setdefault(key, Collective(kind, size_bytes, devices, counts[name]))
    return list(found.values())


def hlo_array_bytes(dtype: str, shape: str) -> int:
    """Returns the size in bytes of an array type in HLO.

    >>> hlo_array_bytes("bf16", "8,128")
    2048
    """
    bits = re.search(r"\d+", dtype)
    return math.prod(int(n) for n in shape.split(",") if n) * (int(bits[0]) if bits else 8) // 8


def group_size(line: str) -> int:
    """Returns the number of devices per replica group; 1 if not specified."""
    if match := MESH_GROUPS_PATTERN.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2 if "source_target_pairs" in line else 1


def trip_counts(computations: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Returns how often each computation of a program is executed."""
    # The TPU compiler omits trip counts, but a loop's condition compares with one.
    bounds = {
        name: max((int(n) for line in lines for n in CONSTANT_PATTERN.findall(line)), default=1)
        for name, lines in computations.items()
    }
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    for caller, lines in computations.items():
        for line in lines:
            count = TRIP_COUNT_PATTERN.search(line)
            condition = re.search(r"condition=%?([\w.\-]+)", line)
            trips = int(count[1]) if count else bounds.get(condition[1], 1) if condition else 1
            for key, names in CALL_PATTERN.findall(line):
                for name in re.findall(r"[\w.\-]+", names):
                    callers.setdefault(name, []).append(
                        (caller, trips if key in ("body", "condition") else 1)
                    )

    @functools.cache
    def count_runs(name: str) -> int:
        return sum(count_runs(caller) * count for caller, count in callers[name]) or 1

    return {name: count_runs(name) for name in callers}


def estimate_collective_bytes(
    config: RunConfig, mesh_shape: Sequence[int], is_emulated: bool = False
) -> dict[str, float]:
    """Estimates the bytes sent per device and pretraining step, with ring algorithms.

    "weights": all-gather of parameters sharded over "fsdp" where they are used; those
    of a layer in the forward and again in the backward pass. "gradients": reduction
    over "data" and "fsdp". "activations": reduction of the residual stream over
    "tensor", twice per layer in the forward and twice in the backward pass, and in the
    embedding and the loss. All of these occur in every micro-batch.

    `is_emulated`: CPU devices, where XLA uses all-reduce instead of reduce-scatter, and
    reduces separately what it could add first: the two gradients of a tied embedding,
    and those of the inputs of query, key and value.
    """
    c, (data, fsdp, tensor) = config.model, mesh_shape
    size, num_micro_batches = compute_dtype(c).itemsize, config.train.accumulate
    gather = RING_TRAFFIC_FACTORS["all-gather"]
    reduce = RING_TRAFFIC_FACTORS["all-reduce"]
    reduce_factor = (reduce if is_emulated else gather)(fsdp) + reduce(data) / fsdp
    weights = gradients = 0.0
    shapes = jax.eval_shape(lambda: init(c, jax.random.key(0)))
    for name, leaf in flatten_with_names(shapes).items():
        axis_names = logical_axes(name, leaf.ndim)
        axes = tuple(logical_to_spec(axis_names, PARAM_RULES))
        local_size = leaf.size / (tensor if "tensor" in axes else 1)
        is_embedding = "embedding" in name
        is_tied = c.tie_embeddings and "token_embed" in name
        gradient = (
            local_size * (4 if is_embedding else size) * (2 if is_tied and is_emulated else 1)
        )
        if "fsdp" not in axes:
            gradients += gradient * reduce(data * fsdp)
            continue
        gradients += gradient * reduce_factor
        used_bytes = 2 * size if "N" in axis_names else size if "output" in name else 4
        if is_tied and size != 4:  # also used as the output projection
            used_bytes += size
        weights += local_size * used_bytes * gather(fsdp)
    positions = config.data.batch_size / num_micro_batches / data / fsdp * c.context_length
    # Full rematerialization repeats that of attention in the backward pass.
    num_reductions = 2 + (4 if is_emulated else 2) + (c.remat == "full")
    bytes_per_feature = c.n_layers * num_reductions * size + size + 4
    activations = positions * (c.d_model * bytes_per_feature + 3 * 4) * reduce(tensor)
    totals = {"weights": weights, "gradients": gradients, "activations": activations}
    return {name: num_micro_batches * each for name, each in totals.items()}
