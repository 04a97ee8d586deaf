"""What can be asked of schedulers; what cannot be had is refused, with what can."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.cli.launch import FILES, launch
from gptjax.cli.machines import GENERATIONS, TAKES, Machines, tpu_slice
from gptjax.errors import ConfigError

TPU = {"topology": "v5e:4x4"}


@pytest.mark.parametrize(
    ("text", "chips", "hosts"),
    [
        *(("v5e:1x1", 1, 1), ("v5e:2x4", 8, 1), ("v5e:4x4", 16, 4)),
        *(("v5e:4x8", 32, 8), ("v6e:16x16", 256, 64), ("v6e:2x2", 4, 1)),
        *(("v5p:2x2x1", 4, 1), ("v5p:2x2x2", 8, 2), ("v4:4x4x8", 128, 32)),
        *(("v5p:16x16x24", 6144, 1536), ("v4:4x4x12", 192, 48)),
    ],
)
def test_a_slice_has_these_chips_and_hosts(text, chips, hosts):
    assert tpu_slice(text)[2:] == (chips, hosts)


@given(st.sampled_from([*GENERATIONS, "v9"]) | st.text(), st.from_regex(r"[0-9x]{0,9}"))
def test_a_topology_is_a_slice_of_4_or_8_chips_per_host_or_refused(name, shape):
    try:
        found = tpu_slice(f"{name}:{shape}")
    except ConfigError:
        return
    assert found.chips == math.prod(map(int, shape.split("x")))
    assert found.chips // found.hosts in ({1, 4, 8} if found.hosts == 1 else {4})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("slurmm", {}, "'slurmm' is not a launcher. Did you mean slurm.*slurm, gke"),
        ("slurm", {"topology": "v5e:4x4"}, "--topology is not supp.*slurm.*--nodes"),
        ("slurm", {"partition": "a b"}, "--partition='a b' must consist of"),
        ("slurm", {"account": "a\n#SBATCH -x"}, "--account=.* must consist of"),
        ("slurm", {"time": "soon"}, "--time='soon' is not a Slurm time limit"),
        ("slurm", {"nodes": 0}, "--nodes=0 must be at least 1"),
        ("slurm", {"devices": -1}, "--devices=-1 must be at least 0"),
        ("slurm", {"run": Path("gs://b/x")}, "--run=gs:/b/x is in an object store"),
        ("slurm", {"run": "a\0b"}, "must not contain null bytes or surrogates"),
        ("slurm", {"run": "a\udc80"}, "must not contain null bytes or surrogates"),
        ("gke", {}, "gke requires a TPU slice.*--topology v5e:4x4"),
        ("gke", TPU, "gke requires a shared file system. Set --volume"),
        ("gke", {**TPU, "volume": "A b"}, "--volume='A b' is not a volume"),
        ("gke", {**TPU, "volume": "a", "run": "../x"}, "--run=../x must be on the volume"),
        ("gke", {**TPU, "volume": "a", "run": "/x"}, "--run=/x must be on the vol"),
        ("gke", {**TPU, "volume": "a", "image": "a b"}, "--image='a b' must consist"),
        ("gke", {"topology": "v5:4x4"}, "is not a TPU slice. Did you mean v5"),
        ("gke", {"topology": "v5e"}, "'v5e' is not a TPU slice.*Use GENERATION:SHAPE"),
        ("gke", {"topology": "v5e:4x5"}, "v5e has no slice of this shape. Use.*4x8"),
        ("gke", {"topology": "v5p:8x4x4"}, "v5p has no slice.*ascending.*6,144"),
        ("tpu-vm", TPU, "tpu-vm requires the zone.*--zone us-west4-a"),
        ("tpu-vm", {**TPU, "zone": "z"}, "tpu-vm requires a shared file system.*10.0.0.2:/"),
        ("tpu-vm", {**TPU, "zone": "z", "volume": "runs"}, "--volume='runs' is not a volume"),
        ("skypilot", {}, "skypilot requires machines.*--accelerator H100"),
        ("skypilot", {"accelerator": "L4"}, "skypilot requires a shared file system"),
        ("skypilot", {"accelerator": "L4", "zone": "z"}, "--zone=z applies to TPUs"),
        ("skypilot", {**TPU, "nodes": 2}, "--nodes=2 and --topology=v5e:4x4 exclude"),
        ("skypilot", {"topology": "v4:4x4x16"}, "requests a number of chips"),
    ],
)
def test_what_a_launcher_cannot_do_is_said_with_what_it_can(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        launch(kind, "tiny", **options)


def test_a_config_must_exist_and_be_one(tmp_path):
    (tmp_path / "bad.toml").write_text("[train]\nstep = 3\n")

    with pytest.raises(ConfigError, match=r"config tinny .*Did you mean tiny"):
        launch("slurm", "tinny")
    with pytest.raises(ConfigError, match=r"unknown option train.step. Did you mean"):
        launch("slurm", str(tmp_path / "bad.toml"))


def test_every_option_is_of_use_to_some_launcher_and_every_launcher_has_some():
    fields = {field.name for field in dataclasses.fields(Machines)}

    assert {name for names in TAKES.values() for name in names.split()} == fields
    assert TAKES.keys() == FILES.keys()
