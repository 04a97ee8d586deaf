"""What is asked of a backend, as far as it decides which of them can answer."""

from typing import NamedTuple

import jax

OLDER_GPU = "gpu without cuDNN attention"  # before NVIDIA's Ampere, or another make


class Call(NamedTuple):
    """One use of attention, without its numbers."""

    queries: int  # [T]
    keys: int  # [S]
    head_width: int  # [K]
    dtype: str
    platform: str  # as `platform` says it
    dropout: bool = False  # whether weights are dropped
    slots: bool = False  # whether queries stand at slots of a cache


def platform() -> str:
    """What this is traced for: "cpu", "tpu", "gpu" or `OLDER_GPU`, as Colab's T4 is.

    A mesh of TPUs counts first: it may be one to compile for, on another machine.
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None and described.device_kind.startswith("TPU"):
        return "tpu"
    name = jax.default_backend()
    if name != "gpu":
        return name
    capability = getattr(jax.devices()[0], "compute_capability", "")
    major = str(capability).split(".")[0]
    return "gpu" if major.isdecimal() and int(major) >= 8 else OLDER_GPU


def cannot_drop(name: str) -> str:
    """What a backend without dropout says to it."""
    return (
        f"model.attention={name!r} cannot drop attention weights. Use "
        "model.attention='plain' or model.dropout=0."
    )
