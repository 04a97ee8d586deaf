"""Machine options of multi-host runs and their validation.

Names that a scheduler reads are restricted to characters that need no quoting.
"""

import dataclasses
import math
import posixpath
import re
from typing import NamedTuple

from gptjax.config import did_you_mean
from gptjax.errors import ConfigError

TAKES = {  # launcher: supported fields of `Machines`
    "slurm": "nodes devices accelerator partition account time",
    "gke": "topology volume image install spot",
    "tpu-vm": "topology volume install zone project spot",
    "skypilot": "nodes devices accelerator topology volume install zone spot",
}
MOUNT = "/shared"  # mount point of the volume on hosts without shared home

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,:/@+-]*")  # safe in shell and YAML
CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
EXPORT = re.compile(r"[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*")
VOLUMES = {CLAIM: "runs (a claim)", EXPORT: "10.0.0.2:/share (an NFS export)"}
TIME = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}")  # format of sbatch
STORE = re.compile(r"(gs|s3|az|abfss?|hdfs|https?):/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """Machines of a run; defaults leave the choice to the launcher."""

    nodes: int | None = None  # number of machines; a topology implies it
    devices: int | None = None  # GPUs per node; 0 = none
    accelerator: str = ""  # GPU type, such as H100
    topology: str = ""  # TPU slice, such as v5e:4x8
    volume: str = ""  # shared file system: a claim or HOST:/EXPORT
    partition: str = ""
    account: str = ""
    time: str = ""  # time limit, such as 24:00:00
    zone: str = ""  # cloud zone, such as us-west4-a
    project: str = ""
    image: str = ""  # container image with gptjax installed
    install: str = ""  # pip requirement; "" = gptjax with its extra
    spot: bool = False  # use spot (preemptible) machines


class Generation(NamedTuple):
    """Names and topology of a TPU generation."""

    axes: int  # topology dimensions
    gke: str  # node label on GKE
    runtime: str  # VM runtime version
    size: str  # prefix of the accelerator type
    cores: int  # cores per chip in the accelerator type


GENERATIONS = {
    "v4": Generation(3, "tpu-v4-podslice", "tpu-ubuntu2204-base", "v4", 2),
    "v5e": Generation(2, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", "v5litepod", 1),
    "v5p": Generation(3, "tpu-v5p-slice", "v2-alpha-tpuv5", "v5p", 2),
    "v6e": Generation(2, "tpu-v6e-slice", "v2-alpha-tpuv6e", "v6e", 1),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
LARGE_CUBES = ("8x8x12", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
USUAL = (*FLAT, *CUBES, *LARGE_CUBES)  # default shapes, given by size alone
MOST_CHIPS = {"v4": 4096, "v5p": 6144}  # maximum of one slice


class Slice(NamedTuple):
    """TPU slice."""

    generation: str
    shape: str
    chips: int
    hosts: int


def check_machines(kind: str, wanted: Machines) -> None:
    """Raises for unsupported, missing or invalid options of a launcher."""
    taken = TAKES[kind].split()
    for field in dataclasses.fields(wanted):
        value = getattr(wanted, field.name)
        if value != field.default and field.name not in taken:
            raise ConfigError(
                f"--{field.name} is not supported by {kind}, which accepts "
                f"{', '.join(f'--{name}' for name in taken)}. Remove it."
            )
    for name in ("accelerator", "partition", "account", "zone", "project", "image"):
        if (value := getattr(wanted, name)) and not WORD.fullmatch(value):
            raise ConfigError(
                f"--{name}={value!r} must consist of letters, digits and . _ , : / @ "
                "+ - and start with a letter or digit."
            )
    if wanted.time and not TIME.fullmatch(wanted.time):
        raise ConfigError(
            f"--time={wanted.time!r} is not a Slurm time limit. Use "
            "HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00."
        )
    for name, least in {"nodes": 1, "devices": 0 if kind == "slurm" else 1}.items():
        value = getattr(wanted, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}.")
    if kind in ("gke", "tpu-vm") and not wanted.topology:
        raise ConfigError(
            f"{kind} requires a TPU slice. Set --topology "
            "GENERATION:SHAPE, such as --topology v5e:4x4."
        )
    if wanted.topology:
        tpu_slice(wanted.topology)
    if kind == "tpu-vm" and not wanted.zone:
        raise ConfigError(
            "tpu-vm requires the zone of the TPU. Set --zone, such as --zone us-west4-a."
        )
    if kind == "skypilot":
        check_skypilot(wanted)
    check_volume(kind, wanted)


def check_skypilot(wanted: Machines) -> None:
    """Raises unless either a TPU slice or GPUs are requested."""
    if not wanted.topology:
        if not wanted.accelerator:
            raise ConfigError(
                "skypilot requires machines. Set --topology v5e:4x4, for example, or "
                " --accelerator H100 --devices 8 --nodes 2."
            )
        if wanted.zone:
            raise ConfigError(
                f"--zone={wanted.zone} applies to TPUs only. Remove it, and set "
                "`infra` in the script."
            )
        return
    for name in ("nodes", "devices", "accelerator"):
        if getattr(wanted, name):
            raise ConfigError(
                f"--{name}={getattr(wanted, name)} and --topology={wanted.topology} "
                "exclude each other. Remove one."
            )
    if tpu_slice(wanted.topology).shape not in USUAL:
        raise ConfigError(
            f"--topology={wanted.topology} is not supported by skypilot, which "
            f"requests a number of chips, not a shape. Use one of {', '.join(USUAL)}."
        )


def check_volume(kind: str, wanted: Machines) -> None:
    """Raises unless all hosts can mount a shared file system."""
    forms = {
        "slurm": [],  # has a shared file system
        "gke": [CLAIM],
        "tpu-vm": [EXPORT],
        "skypilot": [EXPORT] if wanted.topology else [CLAIM, EXPORT],
    }[kind]
    alone = kind == "tpu-vm" and tpu_slice(wanted.topology).hosts == 1
    if not forms or (alone and not wanted.volume):
        return
    examples = " or ".join(VOLUMES[form] for form in forms)
    if not wanted.volume:
        raise ConfigError(
            f"{kind} requires a shared file system. Set --volume, such as {examples}."
        )
    if not any(form.fullmatch(wanted.volume) for form in forms):
        raise ConfigError(
            f"--volume={wanted.volume!r} is not a volume that {kind} can mount. "
            f"Use one such as {examples}."
        )


def check_run(wanted: Machines, run: str) -> None:
    """Raises for a run directory that the hosts do not share."""
    if STORE.match(run):
        raise ConfigError(
            f"--run={run} is in an object store, but must be in a shared file system."
        )
    inside = posixpath.normpath(posixpath.join(MOUNT, run))
    if wanted.volume and not inside.startswith(f"{MOUNT}/"):
        raise ConfigError(
            f"--run={run} must be on the volume {wanted.volume}, which is mounted at "
            f"{MOUNT}. Use a path relative to it, such as runs/first."
        )


def tpu_slice(text: str) -> Slice:
    """Parses a TPU slice such as `v5e:4x8`.

    >>> tpu_slice("v5e:4x8").chips, tpu_slice("v5e:4x8").hosts
    (32, 8)

    Raises:
        ConfigError: unknown generation, or a shape that it does not have.
    """
    name, _, shape = text.partition(":")
    if name not in GENERATIONS or not shape:
        raise ConfigError(
            f"--topology={text!r} is not a TPU slice.{did_you_mean(name, GENERATIONS)} "
            f"Use GENERATION:SHAPE, such as v5e:4x8, with one of "
            f"{', '.join(GENERATIONS)}."
        )
    axes = GENERATIONS[name].axes
    sizes = [int(size) for size in re.findall(r"[1-9]\d{0,3}", shape)]
    good = "x".join(map(str, sizes)) == shape and len(sizes) == axes
    if axes == 2 and not (good and shape in FLAT):
        raise ConfigError(
            f"--topology={text}: {name} has no slice of this shape. Use one of {', '.join(FLAT)}."
        )
    quarters = good and all(size % 4 == 0 for size in sizes) and sizes == sorted(sizes)
    if axes == 3 and not (shape in CUBES or (quarters and math.prod(sizes) <= MOST_CHIPS[name])):
        raise ConfigError(
            f"--topology={text}: {name} has no slice of this shape. Use one of "
            f"{', '.join(CUBES)}, or three ascending multiples of 4 with at most "
            f"{MOST_CHIPS[name]:,} chips."
        )
    chips = math.prod(sizes)
    alone = chips <= (8 if axes == 2 else 4)
    return Slice(name, shape, chips, 1 if alone else chips // 4)
