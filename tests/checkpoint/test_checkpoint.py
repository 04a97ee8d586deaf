"""Saving and restoring checkpoints, and detection of damaged ones."""

import errno
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint import checkpoint, manifest
from gptjax.checkpoint.checkpoint import latest_step, restore, restore_latest, write_step
from gptjax.checkpoint.retention import list_steps
from gptjax.errors import ModelError, ResourceError
from tests.chaos.resharded import checksum_with_numpy


def make_tree(value=0.0):
    return {
        "step": jnp.int32(3),
        "params": {"kernel": jnp.full((3, 4), value), "bias": jnp.arange(4.0)},
        "moments": (jnp.ones(2, jnp.bfloat16), jnp.zeros((), jnp.int32)),
    }


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.fast
def test_restoring_gives_back_every_bit_and_the_metadata(tmp_path):
    tree = make_tree()
    assert restore_latest(tmp_path / "new", tree) == (None, tree, [], {})
    write_step(tmp_path, 3, make_tree(0.1), 2, {"best_score": [0.5]})

    step, restored, warnings, metadata = restore_latest(tmp_path, tree)

    assert (step, warnings, metadata) == (3, [], {"best_score": [0.5]})
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), restored, tree)
    assert_equal(restored, make_tree(0.1))


def test_a_step_with_any_altered_file_is_quarantined(tmp_path):
    for step in (1, 2):
        write_step(tmp_path, step, make_tree(step), keep=9)

    for path in [path for path in (tmp_path / "2").rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for fault in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b"x", None):
            path.unlink()
            if fault is not None:
                path.write_bytes(fault)
            step, warnings = latest_step(tmp_path)
            (tmp_path / "2.damaged").rename(tmp_path / "2")
            path.write_bytes(data)
            assert step == 1, (fault, path)
            assert "damaged" in warnings[0]

    assert latest_step(tmp_path) == (2, [])
    path = tmp_path / "2" / manifest.MANIFEST
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": {"best": 1}'))
    assert latest_step(tmp_path)[0] == 1


def test_restored_arrays_that_differ_from_the_saved_ones_are_quarantined(tmp_path):
    for step in (1, 2):
        write_step(tmp_path, step, make_tree(float(step)), keep=2)
    contents = manifest.read_manifest(tmp_path / "2")
    contents["arrays"]["params/bias"][1] ^= 1
    (tmp_path / "2" / manifest.MANIFEST).unlink()
    manifest.write_manifest(tmp_path / "2", contents)

    step, tree, warnings, _ = restore_latest(tmp_path, make_tree())

    assert step == 1
    assert_equal(tree, make_tree(1.0))
    assert "params/bias" in warnings[0]
    assert (tmp_path / "2.damaged").is_dir()


def test_arrays_with_other_dtypes_are_rejected_and_the_step_is_kept(tmp_path, monkeypatch):
    write_step(tmp_path, 1, make_tree(), keep=2)
    other = make_tree()
    other["params"]["kernel"] = jnp.zeros((3, 4), jnp.bfloat16)

    with pytest.raises(ModelError, match="params/kernel"):
        restore_latest(tmp_path, other)
    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", None)
    with pytest.raises(ModelError, match="not callable"):
        restore_latest(tmp_path, make_tree())
    assert list_steps(tmp_path) == [1]


def test_nothing_is_saved_of_a_step_that_fails(tmp_path, monkeypatch):
    write_step(tmp_path, 1, make_tree(), keep=2)
    broken = make_tree()
    broken["params"]["kernel"] = broken["params"]["kernel"].at[2, 3].set(np.inf)

    with pytest.raises(ModelError, match="params/kernel"):
        write_step(tmp_path, 2, broken, keep=2)

    def fail(*_, **__):
        raise ValueError(f"write failed [os_error_code='{errno.EFBIG}']")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", fail)
    with pytest.raises(ModelError, match=r"step 2 .*write failed") as error:
        write_step(tmp_path, 2, make_tree(), keep=2)
    assert error.value.__cause__.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_donated_arrays_are_saved_as_they_were(tmp_path, monkeypatch):
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree, saved, may_write = jax.tree.map(jnp.array, make_tree(0.5)), [], threading.Event()
    before = jax.tree.map(np.array, tree)
    write = checkpoint.write_step
    monkeypatch.setattr(checkpoint, "write_step", lambda *args: may_write.wait() and write(*args))

    with checkpoint.async_saver(tmp_path, 2, saved.append) as save:
        save(3, tree)
        for _ in range(3):
            tree = add_one(tree)
        jax.block_until_ready(tree)
        assert saved == []
        may_write.set()
        save(4, tree)

    assert saved == [3, 4]
    assert_equal(restore(tmp_path, 3, make_tree()), before)
    assert float(restore(tmp_path, 4, make_tree())["params"]["kernel"][0, 0]) == 3.5


def test_a_failed_save_is_reported_by_the_next_save_or_at_the_end(tmp_path, monkeypatch):
    broken = {**make_tree(), "step": jnp.float32(np.nan)}

    with checkpoint.async_saver(tmp_path, 2) as save:
        save(1, broken)
        with pytest.raises(ModelError, match="step 1 "):
            save(2, make_tree())
    with pytest.raises(ModelError, match="step 1 "), checkpoint.async_saver(tmp_path, 2) as save:
        save(1, broken)
    assert list_steps(tmp_path) == []

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    new = tmp_path / "new"
    with checkpoint.async_saver(new, 2) as save, pytest.raises(ResourceError, match="needs 1 MB"):
        save(2, make_tree())
    assert not new.exists()


def checksum_of(array):
    return checkpoint.checksum_tree({"a": array})[0]["a"]


@pytest.mark.fast
def test_checksums_agree_with_numpy_on_any_mesh():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    for axes in (("a", None), (None, "b"), ("b", "a")):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
        assert checksum_of(sharded) == checksum_with_numpy(x)
    assert checksum_of(x) == checksum_with_numpy(x)


@pytest.mark.parametrize("dtype", ["int8", "bool", "bfloat16", "float32"])
def test_any_flipped_bit_changes_the_checksum(dtype):
    bits = 1 if dtype == "bool" else 8 * jnp.dtype(dtype).itemsize
    ones = np.ones(10, dtype).view(f"u{jnp.dtype(dtype).itemsize}")
    flips = (np.eye(10, dtype=ones.dtype)[None] << np.arange(bits)[:, None, None]).reshape(-1, 10)
    flipped = (ones ^ flips.astype(ones.dtype)).view(jnp.dtype(dtype))

    sums = jax.jit(jax.vmap(checkpoint.checksum))(flipped)

    assert checksum_of(np.ones(10, dtype)) not in np.asarray(sums)


def test_a_run_folder_that_is_gone_is_not_created_again(tmp_path):
    with pytest.raises(ModelError, match="renamed"):
        write_step(tmp_path / "renamed" / "checkpoints", 1, make_tree(), keep=2)
    assert not list(tmp_path.iterdir())
