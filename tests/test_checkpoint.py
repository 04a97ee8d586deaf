"""Checkpoints: what is saved comes back, and what was altered is not trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import checkpoint
from gptjax.errors import ModelError


def tree(value=0.0):
    return {
        "step": jnp.int32(3),
        "params": {"kernel": jnp.full((3, 4), value), "bias": jnp.arange(4.0)},
        "moments": (jnp.ones(2, jnp.bfloat16), jnp.zeros((), jnp.int32)),
    }


@pytest.mark.fast
def test_restoring_gives_back_every_bit_and_the_structure(tmp_path):
    checkpoint.save(tmp_path, 3, tree(0.1), keep=2)

    restored = checkpoint.restore(tmp_path, 3, tree())

    assert jax.tree.structure(restored) == jax.tree.structure(tree())
    jax.tree.map(np.testing.assert_array_equal, restored, tree(0.1))


def test_only_the_newest_steps_are_kept(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, tree(), keep=2)

    assert checkpoint.saved_steps(tmp_path) == [2, 10]
    assert checkpoint.latest(tmp_path) == (10, [])


def test_nothing_saved_is_no_step_and_no_error(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") == (None, [])


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
        checkpoint.save(tmp_path, step, tree(step), keep=9)
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]

    for victim in files:
        copy = {path: path.read_bytes() for path in files}
        FAULTS[fault](victim)
        step, (complaint,) = checkpoint.latest(tmp_path)
        assert step == 1
        assert "damaged" in complaint
        (tmp_path / "2.damaged").rename(tmp_path / "2")
        for path, data in copy.items():
            path.write_bytes(data)

    assert checkpoint.latest(tmp_path) == (2, [])


def test_an_alien_folder_named_by_a_number_does_not_count(tmp_path):
    checkpoint.save(tmp_path, 1, tree(), keep=2)
    (tmp_path / "999999").mkdir()

    step, complaints = checkpoint.latest(tmp_path)

    assert step == 1
    assert len(complaints) == 1


def test_when_nothing_can_be_trusted_the_run_does_not_start_anew(tmp_path):
    checkpoint.save(tmp_path, 1, tree(), keep=2)
    (tmp_path / "1" / "manifest.json").write_text("{}")

    for _ in range(2):
        with pytest.raises(ModelError, match="can be trusted"):
            checkpoint.latest(tmp_path)


def test_other_arrays_than_the_saved_ones_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, tree(), keep=2)
    other = tree()
    other["params"]["kernel"] = jnp.zeros((3, 4), jnp.bfloat16)

    with pytest.raises(ModelError, match="params/kernel"):
        checkpoint.restore(tmp_path, 1, other)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(ModelError, match="cannot save step 1"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, tree(), keep=2)
