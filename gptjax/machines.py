"""The machines of a run on many hosts: what schedulers can be asked for, checked.

Names that a scheduler reads are held to what all of them take, so that they stand in
its files as they are.
"""

import dataclasses
import math
import posixpath
import re
from typing import NamedTuple

from gptjax.config import suggestion
from gptjax.errors import ConfigError

TAKES = {  # kind of launcher: what it can use of `Machines`
    "slurm": "nodes devices accelerator partition account time",
    "gke": "topology volume image install spot",
    "tpu-vm": "topology volume install zone project spot",
    "skypilot": "nodes devices accelerator topology volume install zone spot",
}
MOUNT = "/shared"  # where hosts that share no home have the volume

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,:/@+-]*")  # harmless in shell and YAML
CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
EXPORT = re.compile(r"[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*")
VOLUMES = {CLAIM: "runs, a claim's name", EXPORT: "10.0.0.2:/share, of an NFS server"}
TIME = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}")  # as sbatch reads it
STORE = re.compile(r"(gs|s3|az|abfss?|hdfs|https?):/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """Where a run takes place; the default of each is to leave it to the launcher."""

    nodes: int | None = None  # machines; of a topology they follow
    devices: int | None = None  # GPUs per node, 0 for none
    accelerator: str = ""  # kind of GPU: H100
    topology: str = ""  # TPU slice: v5e:4x8
    volume: str = ""  # file system that all hosts share: a claim, or HOST:/EXPORT
    partition: str = ""
    account: str = ""
    time: str = ""  # limit: 24:00:00
    zone: str = ""  # of the cloud: us-west4-a
    project: str = ""
    image: str = ""  # container that gptjax is installed in
    install: str = ""  # what pip installs where it is not; "" = gptjax with its extra
    spot: bool = False  # machines that can be taken away, at a lower price


class Generation(NamedTuple):
    """What one generation of TPUs is called where, and its shape."""

    axes: int  # of a topology
    gke: str  # label of its nodes
    runtime: str  # image of its virtual machines
    size: str  # what comes before the number in an accelerator's type
    cores: int  # that this number counts for each chip


GENERATIONS = {
    "v4": Generation(3, "tpu-v4-podslice", "tpu-ubuntu2204-base", "v4", 2),
    "v5e": Generation(2, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", "v5litepod", 1),
    "v5p": Generation(3, "tpu-v5p-slice", "v2-alpha-tpuv5", "v5p", 2),
    "v6e": Generation(2, "tpu-v6e-slice", "v2-alpha-tpuv6e", "v6e", 1),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
LARGE_CUBES = ("8x8x12", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
USUAL = (*FLAT, *CUBES, *LARGE_CUBES)  # what a size alone stands for
MOST_CHIPS = {"v4": 4096, "v5p": 6144}  # of one slice


class Slice(NamedTuple):
    """TPUs with links between them."""

    generation: str
    shape: str
    chips: int
    hosts: int


def check(kind: str, wanted: Machines) -> None:
    """Raises for options that the launcher cannot use, lacks, or would stumble over."""
    taken = TAKES[kind].split()
    for field in dataclasses.fields(wanted):
        value = getattr(wanted, field.name)
        if value != field.default and field.name not in taken:
            raise ConfigError(
                f"--{field.name} is of no use to {kind}, which takes "
                f"{', '.join(f'--{name}' for name in taken)}. Leave it out."
            )
    for name in ("accelerator", "partition", "account", "zone", "project", "image"):
        if (value := getattr(wanted, name)) and not WORD.fullmatch(value):
            raise ConfigError(
                f"--{name}={value!r} is no name that {kind} can have. Use letters, "
                "digits and any of . _ , : / @ + - after the first."
            )
    if wanted.time and not TIME.fullmatch(wanted.time):
        raise ConfigError(
            f"--time={wanted.time!r} is no time limit of Slurm. Write "
            "HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00."
        )
    for name, least in {"nodes": 1, "devices": 0 if kind == "slurm" else 1}.items():
        value = getattr(wanted, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} is too small. Give at least {least}.")
    if kind in ("gke", "tpu-vm") and not wanted.topology:
        raise ConfigError(
            f"{kind} needs the TPU slice to train on. Give --topology "
            "GENERATION:SHAPE, such as --topology v5e:4x4."
        )
    if wanted.topology:
        tpu_slice(wanted.topology)
    if kind == "tpu-vm" and not wanted.zone:
        raise ConfigError(
            "tpu-vm needs the zone that the TPU is in. Give --zone, such as "
            "--zone us-west4-a."
        )
    if kind == "skypilot":
        check_skypilot(wanted)
    check_volume(kind, wanted)


def check_skypilot(wanted: Machines) -> None:
    """Raises unless SkyPilot is asked either for a TPU slice or for GPUs."""
    if not wanted.topology:
        if not wanted.accelerator:
            raise ConfigError(
                "skypilot needs the machines to train on. Give --topology v5e:4x4, "
                "for example, or --accelerator H100 --devices 8 --nodes 2."
            )
        if wanted.zone:
            raise ConfigError(
                f"--zone={wanted.zone} is for TPUs; GPUs are looked for in all "
                "clouds. Leave it out, and write `infra` in the file."
            )
        return
    for name in ("nodes", "devices", "accelerator"):
        if getattr(wanted, name):
            raise ConfigError(
                f"--{name}={getattr(wanted, name)} and --topology={wanted.topology} "
                "both say what to train on. Leave one of them out."
            )
    if tpu_slice(wanted.topology).shape not in USUAL:
        raise ConfigError(
            f"--topology={wanted.topology} cannot be had from skypilot, which asks "
            f"for a number of chips and not for a shape. Use one of {', '.join(USUAL)}."
        )


def check_volume(kind: str, wanted: Machines) -> None:
    """Raises unless all hosts can have one file system that outlives them."""
    forms = {
        "slurm": [],  # its nodes have one
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
            f"{kind} needs a shared file system for the run. Give --volume, such as "
            f"{examples}."
        )
    if not any(form.fullmatch(wanted.volume) for form in forms):
        raise ConfigError(
            f"--volume={wanted.volume!r} is no shared file system that {kind} can "
            f"mount here. Give one such as {examples}."
        )


def check_run(wanted: Machines, run: str) -> None:
    """Raises for a folder that the hosts do not share."""
    if STORE.match(run):
        raise ConfigError(
            f"--run={run} is in an object store, but a run needs a shared file system. "
            "Give a folder of one."
        )
    inside = posixpath.normpath(posixpath.join(MOUNT, run))
    if wanted.volume and not inside.startswith(f"{MOUNT}/"):
        raise ConfigError(
            f"--run={run} is not on the volume {wanted.volume}, which hosts have at "
            f"{MOUNT}. Give a folder relative to it, such as runs/first."
        )


def tpu_slice(text: str) -> Slice:
    """The slice that `v5e:4x8` names.

    >>> tpu_slice("v5e:4x8").chips, tpu_slice("v5e:4x8").hosts
    (32, 8)

    Raises:
        ConfigError: there is no such generation, or it has no such slice.
    """
    name, _, shape = text.partition(":")
    if name not in GENERATIONS or not shape:
        raise ConfigError(
            f"--topology={text!r} names no TPU slice.{suggestion(name, GENERATIONS)} "
            f"Write GENERATION:SHAPE, such as v5e:4x8, with one of "
            f"{', '.join(GENERATIONS)}."
        )
    axes = GENERATIONS[name].axes
    sizes = [int(size) for size in re.findall(r"[1-9]\d{0,3}", shape)]
    good = "x".join(map(str, sizes)) == shape and len(sizes) == axes
    if axes == 2 and not (good and shape in FLAT):
        raise ConfigError(
            f"--topology={text}: {name} has no slice of that shape. Choose one of "
            f"{', '.join(FLAT)}."
        )
    quarters = good and all(size % 4 == 0 for size in sizes) and sizes == sorted(sizes)
    if axes == 3 and not (
        shape in CUBES or (quarters and math.prod(sizes) <= MOST_CHIPS[name])
    ):
        raise ConfigError(
            f"--topology={text}: {name} has no slice of that shape. Choose one of "
            f"{', '.join(CUBES)}, or three rising multiples of 4 with at most "
            f"{MOST_CHIPS[name]:,} chips."
        )
    chips = math.prod(sizes)
    alone = chips <= (8 if axes == 2 else 4)
    return Slice(name, shape, chips, 1 if alone else chips // 4)
