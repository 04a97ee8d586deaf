"""What accelerators can do, from their makers' data sheets, and which a name means.

Rates are of one chip: dense bfloat16 products, the memory beside it, and what a ring
along one axis of a slice sends through it, both ways (of GPUs: what NVLink sends).
"""

import math
import re
from typing import NamedTuple

from gptjax.config import suggestion
from gptjax.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """The rates of one chip."""

    kind: str  # how JAX names the device
    platform: str
    flops: float  # FLOP/s
    memory: int  # bytes
    bandwidth: float  # bytes/s
    links: float  # bytes/s


# TPUs: cloud.google.com/tpu/docs, pages "v4" to "v6e", and for links Austin et al.
# 2025, "How to Scale Your Model"; GPUs: NVIDIA's data sheets of the SXM modules. A CPU
# has no figures: its rates are what a benchmark finds.
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
SHAPES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 256: "16x16"}


class Topology(NamedTuple):
    """Devices of one kind, next to each other."""

    name: str  # as it was asked for
    chip: Chip
    devices: int
    shape: str  # of a TPU slice: "2x4"; of others their number

    def __str__(self) -> str:
        """As people say it."""
        return f"{self.devices} x {self.chip.kind}"


def topology(text: str) -> Topology:
    """The devices that "v5e:2x4", "v6e:1", "h100:8" or "cpu:8" names.

    Raises:
        ConfigError: there are no such chips, or the shape is none.

    >>> topology("v5e:2x4").devices, topology("v5e:8").shape
    (8, '2x4')
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology {text}: there is no chip {name!r}.{suggestion(name, CHIPS)} "
            f"Write KIND:NUMBER or KIND:SHAPE with one of {', '.join(CHIPS)}."
        )
    shape = shape or "1"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        raise ConfigError(
            f"--topology {text}: {shape!r} is no shape. Write a number such as "
            f"{name}:8, or a shape such as v5e:2x4."
        )
    chip = CHIPS[name]
    if chip.platform == "tpu" and "x" not in shape:
        flat = name in ("v5e", "v6e")
        if int(shape) not in SHAPES or (not flat and int(shape) > 1):
            raise ConfigError(
                f"--topology {text} leaves the shape open. Write it, such as "
                f"{name}:{'2x4' if flat else '2x2x4'}."
            )
        shape = SHAPES[int(shape)] if flat else "1x1x1"
    return Topology(text, chip, math.prod(map(int, shape.split("x"))), shape)


def here() -> Topology:
    """The devices of this machine, and of the other processes of its run."""
    import jax

    count, kind = jax.device_count(), jax.devices()[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        chip = CHIPS["cpu"]._replace(kind=kind, platform=jax.default_backend())
    return Topology("", chip, count, str(count))


def chip_of(kind: str) -> Chip | None:
    """The chip whose devices JAX calls that, or None where its rates are not known.

    >>> chip_of("NVIDIA H100 80GB HBM3").flops
    989000000000000.0
    """
    known = [c for c in CHIPS.values() if kind.startswith(c.kind) and c.memory]
    return max(known, key=lambda chip: len(chip.kind), default=None)
