"""Checkpoints: what is saved comes back, and what was altered is not trusted."""

import collections
import errno
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint import checkpoint as checkpoint_module
from gptjax.checkpoint import manifest
from gptjax.checkpoint.checkpoint import (
    async_saver,
    latest_step,
    ocp,
    restore,
    restore_latest,
    save_step,
    write_step,
)
from gptjax.checkpoint.retention import list_steps
from gptjax.errors import ModelError
from tests.processes import ROOT


def tree(value=0.0):
    return {
        "step": jnp.int32(3),
        "params": {"kernel": jnp.full((3, 4), value), "bias": jnp.arange(4.0)},
        "moments": (jnp.ones(2, jnp.bfloat16), jnp.zeros((), jnp.int32)),
    }


@pytest.mark.fast
def test_restoring_gives_back_every_bit_and_the_structure(tmp_path):
    save_step(tmp_path, 3, tree(0.1), keep=2)

    restored = restore(tmp_path, 3, tree())

    assert jax.tree.structure(restored) == jax.tree.structure(tree())
    jax.tree.map(np.testing.assert_array_equal, restored, tree(0.1))


def test_only_the_newest_steps_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_step(tmp_path, step, tree(), keep=2)

    assert list_steps(tmp_path) == [2, 10]
    assert latest_step(tmp_path) == (10, [])


def test_nothing_saved_is_no_step_and_no_error(tmp_path):
    assert latest_step(tmp_path / "checkpoints") == (None, [])


FAULTS = {
    "flipped bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
}


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_with_any_altered_file_is_set_aside_for_the_one_before(tmp_path, fault):
    for step in (1, 2):
        save_step(tmp_path, step, tree(step), keep=9)
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]

    for victim in files:
        copy = {path: path.read_bytes() for path in files}
        FAULTS[fault](victim)
        step, (complaint,) = latest_step(tmp_path)
        assert step == 1
        assert "damaged" in complaint
        (tmp_path / "2.damaged").rename(tmp_path / "2")
        for path, data in copy.items():
            path.write_bytes(data)

    assert latest_step(tmp_path) == (2, [])


def test_an_alien_folder_named_by_a_number_does_not_count(tmp_path):
    save_step(tmp_path, 1, tree(), keep=2)
    (tmp_path / "999999").mkdir()

    step, complaints = latest_step(tmp_path)

    assert step == 1
    assert len(complaints) == 1


def test_when_nothing_can_be_trusted_the_run_does_not_start_anew(tmp_path):
    save_step(tmp_path, 1, tree(), keep=2)
    (tmp_path / "1" / "manifest.json").write_text("{}")

    for _ in range(2):
        with pytest.raises(ModelError, match="no valid checkpoint"):
            latest_step(tmp_path)


def test_other_arrays_than_the_saved_ones_are_refused(tmp_path):
    save_step(tmp_path, 1, tree(), keep=2)
    other = tree()
    other["params"]["kernel"] = jnp.zeros((3, 4), jnp.bfloat16)

    with pytest.raises(ModelError, match="params/kernel"):
        restore(tmp_path, 1, other)


def test_arrays_of_another_mesh_come_back_with_the_checksums_they_had(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("part",))
    split = NamedSharding(mesh, PartitionSpec(None, "part"))
    state = {"kernel": jax.device_put(jnp.arange(32.0).reshape(2, 16), split)}
    save_step(tmp_path, 1, state, keep=2)

    restored = restore(tmp_path, 1, {"kernel": jnp.zeros((2, 16))})

    np.testing.assert_array_equal(restored["kernel"], state["kernel"])


def test_arrays_that_come_back_other_than_they_were_are_set_aside(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step, tree(float(step)), keep=2)
    about = manifest.read_manifest(tmp_path / "2")
    about["arrays"]["params/bias"][1] ^= 1
    (tmp_path / "2" / manifest.MANIFEST).unlink()
    manifest.write_manifest(tmp_path / "2", about)

    step, restored, complaints, _ = restore_latest(tmp_path, tree())

    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, restored, tree(1.0))
    assert "2 is damaged: the restored values of 'params/bias'" in complaints[0]
    assert (tmp_path / "2.damaged").is_dir()


def test_where_nothing_was_saved_a_run_starts_with_what_it_has(tmp_path):
    fresh = tree()

    assert restore_latest(tmp_path, fresh) == (None, fresh, [], {})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_never_saved(tmp_path, value):
    save_step(tmp_path, 1, tree(), keep=2)
    broken = tree()
    broken["params"]["kernel"] = broken["params"]["kernel"].at[2, 3].set(value)

    with pytest.raises(ModelError, match="params/kernel contains non-finite"):
        save_step(tmp_path, 2, broken, keep=2)

    assert [path.name for path in tmp_path.iterdir()] == ["1"]


Usage = collections.namedtuple("Usage", ["total", "used", "free"])


def test_a_save_that_the_disk_has_no_room_for_is_refused_before(tmp_path, monkeypatch):
    save_step(tmp_path, 1, tree(), keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e6, 8e6, 1e6))

    with pytest.raises(ModelError, match=r"needs 1 MB, but 1 MB are free"):
        save_step(tmp_path, 2, tree(), keep=2)

    assert latest_step(tmp_path) == (1, [])


# In a process of its own: Orbax's threads go on after its save has failed, and what
# they leave would be found by any later test.
FULL = """
import resource, sys
from pathlib import Path
from gptjax.checkpoint import checkpoint
from gptjax.errors import ModelError
from tests.checkpoint.test_checkpoint import tree

soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for most in map(int, sys.argv[2:]):
    folder = Path(sys.argv[1]) / str(most)
    checkpoint.save_step(folder, 1, tree(), keep=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        checkpoint.save_step(folder, 2, tree(), keep=2)
    except ModelError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = str(error).startswith("cannot save step 2"), error.__cause__.errno
        print(most, *said, *checkpoint.latest_step(folder))
"""


def test_a_disk_that_takes_no_more_is_the_cause_wherever_it_is_met(tmp_path):
    limits = 0, 30, 100, 300, 1000
    command = [sys.executable, "-c", FULL, str(tmp_path), *map(str, limits)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    found = [f"{most} True {errno.EFBIG} 1 []" for most in limits]
    assert done.stdout.splitlines() == found


def test_what_the_loop_donates_after_a_save_is_saved_as_it_was(tmp_path):
    move = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state, said = jax.tree.map(jnp.array, tree(0.5)), []
    before = jax.tree.map(np.array, state)
    held = threading.Event()

    with async_saver(tmp_path, 2, said.append) as save:
        store = write_step
        with pytest.MonkeyPatch.context() as patch:
            late = lambda *given: held.wait() and store(*given)  # noqa: E731
            patch.setattr(checkpoint_module, "write_step", late)
            save(3, state)
            for _ in range(3):
                state = move(state)
            jax.block_until_ready(state)
            assert said == []
            held.set()
            save(4, state)

    assert said == [3, 4]
    restored = restore(tmp_path, 3, tree())
    jax.tree.map(np.testing.assert_array_equal, restored, before)
    assert float(restore(tmp_path, 4, tree())["params"]["kernel"][0, 0]) == 3.5


def test_a_save_that_fails_later_is_said_by_the_next_one(tmp_path):
    with async_saver(tmp_path, 2) as save:
        save(1, {**tree(), "step": jnp.float32(np.nan)})

        with pytest.raises(ModelError, match="step 1 is not saved: step contains"):
            save(2, tree())

    assert list_steps(tmp_path) == []


def test_a_save_that_fails_last_is_said_by_the_end(tmp_path):
    with pytest.raises(ModelError, match="step 1 is not saved"), async_saver(tmp_path, 2) as save:
        save(1, {**tree(), "step": jnp.float32(np.nan)})


def test_a_failure_of_orbax_is_told_with_what_to_do(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    save_step(tmp_path, 1, tree(), keep=2)
    monkeypatch.setattr(ocp.Checkpointer, "save", full)

    with pytest.raises(ModelError, match=r"cannot save step 2 .* No space left"):
        save_step(tmp_path, 2, tree(), keep=2)

    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_restore_that_orbax_refuses_leaves_the_step_where_it_is(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise KeyError("no such driver")

    save_step(tmp_path, 1, tree(), keep=2)
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", refused)

    with pytest.raises(ModelError, match=r"cannot restore .* Orbax"):
        restore_latest(tmp_path, tree())

    assert list_steps(tmp_path) == [1]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(ModelError, match="cannot save step 1"):
        save_step(tmp_path / "file" / "checkpoints", 1, tree(), keep=2)
