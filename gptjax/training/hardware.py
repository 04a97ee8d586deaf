"""Published peak rates of accelerators; parsing of topologies.

Rates are per chip: dense bfloat16 matmuls, memory bandwidth, and the bandwidth of a
ring along one axis of a slice, both directions (GPUs: one direction of NVLink).
"""

import math
import re
from typing import NamedTuple

from gptjax.config import did_you_mean
from gptjax.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """Peak rates of one chip."""

    kind: str  # prefix of JAX's device_kind
    platform: str
    peak_flops: float  # FLOP/s
    memory: int  # bytes
    memory_bandwidth: float  # bytes/s
    interconnect_bandwidth: float  # bytes/s


# TPUs: cloud.google.com/tpu/docs, pages "v4" to "v6e", interconnect from Austin et al.
# 2025, "How to Scale Your Model"; GPUs: NVIDIA's data sheets of the SXM modules. Rates
# of CPUs are unknown without a benchmark.
CHIPS = {
    "v4": Chip("TPU v4", "tpu", 275e12, 32 * GIB, 1228e9, 90e9),
    "v5e": Chip("TPU v5 lite", "tpu", 197e12, 16 * GIB, 819e9, 90e9),
    "v5p": Chip("TPU v5", "tpu", 459e12, 95 * GIB, 2765e9, 180e9),
    "v6e": Chip("TPU v6 lite", "tpu", 918e12, 32 * GIB, 1640e9, 180e9),
    "a100": Chip("NVIDIA A100", "gpu", 312e12, 80 * GIB, 2039e9, 300e9),
    "h100": Chip("NVIDIA H100", "gpu", 989e12, 80 * GIB, 3350e9, 450e9),
    "h200": Chip("NVIDIA H200", "gpu", 989e12, 141 * GIB, 4800e9, 450e9),
    "cpu": Chip("cpu", "cpu", math.nan, 0, math.nan, math.nan),
}
MAX_DEVICES = 65_536
MAX_CPU_DEVICES = 1024  # emulated by one process
TPU_SLICE_SHAPES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 256: "16x16"}


class Topology(NamedTuple):
    """Number and arrangement of devices of one kind."""

    name: str  # as given, such as "v5e:2x4"
    chip: Chip
    devices: int
    shape: str  # TPUs: of the slice, "2x4"; others: the number

    def __str__(self) -> str:
        """Formats as "8 x TPU v5 lite"."""
        return f"{self.devices} x {self.chip.kind}"


def parse_topology(text: str) -> Topology:
    """Parses a topology such as "v5e:2x4", "v6e:1", "h100:8" or "cpu:8".

    >>> parse_topology("v5e:2x4").devices, parse_topology("v5e:8").shape
    (8, '2x4')
    """
    name, _, shape = text.partition(":")
    shape = shape or "1"
    is_valid = re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,2}", shape, re.ASCII)
    count = math.prod(map(int, shape.split("x"))) if is_valid else 0
    limit = MAX_CPU_DEVICES if name == "cpu" else MAX_DEVICES
    if name not in CHIPS or not 0 < count <= limit:
        hint = did_you_mean(name[:80], CHIPS) if name not in CHIPS else ""
        raise ConfigError(
            f"--topology {text:.80} is not valid.{hint} Write KIND:NUMBER or KIND:SHAPE, such as "
            f"h100:8 or v5e:2x4, with one of {', '.join(CHIPS)} and at most {limit:,} devices."
        )
    chip = CHIPS[name]
    if chip.platform == "tpu" and "x" not in shape:
        is_2d = name in ("v5e", "v6e")
        if int(shape) not in TPU_SLICE_SHAPES or (not is_2d and int(shape) > 1):
            raise ConfigError(
                f"--topology {text} does not determine the shape. Write, for example, "
                f"{name}:{'2x4' if is_2d else '2x2x4'}."
            )
        shape = TPU_SLICE_SHAPES[int(shape)] if is_2d else "1x1x1"
    return Topology(text, chip, math.prod(map(int, shape.split("x"))), shape)


def local_topology() -> Topology:
    """Returns the topology of all devices that JAX sees, of all processes."""
    import jax

    count, kind = jax.device_count(), jax.devices()[0].device_kind
    unknown_chip = CHIPS["cpu"]._replace(kind=kind, platform=jax.default_backend())
    return Topology("", chip_from_device(kind) or unknown_chip, count, str(count))


def chip_from_device(kind: str) -> Chip | None:
    """Returns the chip with this `device_kind`, or None if its rates are unknown.

    >>> chip_from_device("NVIDIA H100 80GB HBM3").peak_flops
    989000000000000.0
    """
    known = [c for c in CHIPS.values() if kind.startswith(c.kind) and c.memory]
    return max(known, key=lambda chip: len(chip.kind), default=None)
