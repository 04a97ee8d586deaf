"""Step folders: which are valid, which are deleted, and which are left alone."""

import shutil

import pytest

from gptjax.checkpoint import retention
from gptjax.checkpoint.manifest import write_manifest
from gptjax.errors import ModelError


def save(checkpoint_dir, *steps):
    """Saves steps of one file each, as `write_step` does."""
    for step in steps:
        partial_dir = retention.begin_step(checkpoint_dir, step)
        partial_dir.mkdir()
        (partial_dir / "file").write_text(f"of step {step}")
        write_manifest(partial_dir, {"step": step, "arrays": {}})
        retention.commit_step(checkpoint_dir, step)


def test_other_entries_are_left_alone_and_are_no_checkpoint(tmp_path):
    (tmp_path / "1.partial" / "state").mkdir(parents=True)
    assert retention.latest_valid_step(tmp_path) == (None, [])  # a crash in the first save
    assert list(tmp_path.iterdir()) == []

    for number, name in enumerate(["notes.txt", "007", "-1", "٣", "x.partial"]):
        folder = tmp_path / str(number)
        (folder / name).mkdir(parents=True)
        with pytest.raises(ModelError, match=f"'{name}'"):
            retention.latest_valid_step(folder)
        save(folder, 1)
        assert retention.latest_valid_step(folder) == (1, [])
        assert (folder / name).is_dir()


def test_without_a_valid_step_a_run_does_not_start_again(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1" / "manifest.json").write_text("{}")

    for _ in range(2):
        with pytest.raises(ModelError, match="backup"):
            retention.latest_valid_step(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "copy"])
@pytest.mark.parametrize("name", ["2", "2/file", "2/more"])
def test_a_foreign_step_or_an_additional_entry_is_quarantined(tmp_path, kind, name):
    save(tmp_path / "run", 1, 2)
    path = tmp_path / "run" / name
    if path.exists():
        path.rename(tmp_path / "same")
    {
        "folder": path.mkdir,
        "file": lambda: path.write_text("x"),
        "link": lambda: path.symlink_to(tmp_path / "same"),
        "copy": lambda: shutil.copytree(tmp_path / "run" / "1", path),
    }[kind]()

    step, (warning,) = retention.latest_valid_step(tmp_path / "run")

    assert step == 1
    assert "checkpoint 2 is damaged" in warning
    assert [*(tmp_path / "run").glob("2*")] == [tmp_path / "run" / "2.damaged"]


@pytest.mark.parametrize(
    ("keep", "damaged", "kept"),
    [
        (3, [], [2, 3, 4]),
        (1, [], [3, 4]),  # never fewer than two
        (2, [3], [2, 3, 4]),  # a damaged step is no fallback
        (2, [1, 2, 3], [1, 2, 3, 4]),  # only the newest is valid
    ],
)
def test_retention_keeps_the_newest_steps_and_a_valid_fallback(tmp_path, keep, damaged, kept):
    save(tmp_path, 1, 2, 3, 4)
    for step in damaged:
        (tmp_path / str(step) / "file").write_text("something else")

    retention.apply_retention(tmp_path, 4, keep)

    assert retention.list_steps(tmp_path) == kept
