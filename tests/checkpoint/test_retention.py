"""Folders of steps: which count, which are deleted, and what is left alone."""

import pytest

from gptjax.checkpoint import retention
from gptjax.checkpoint.manifest import write_manifest
from gptjax.errors import ModelError


def saved(folder, *steps):
    """Steps as `gptjax.checkpoint.checkpoint` saves them, of one file each."""
    for step in steps:
        building = retention.begin_step(folder, step)
        building.mkdir()
        (building / "file").write_text(f"of step {step}")
        write_manifest(building, {"step": step, "arrays": {}})
        retention.commit_step(folder, step)


def damage(folder, step):
    (folder / str(step) / "file").write_text("something else")


def test_what_is_left_of_a_crash_in_the_first_save_is_a_fresh_start(tmp_path):
    (tmp_path / "1.partial" / "state").mkdir(parents=True)

    assert retention.latest_valid_step(tmp_path) == (None, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "007", "-1", "1.damaged", "x.partial"])
def test_anything_else_without_a_step_is_no_fresh_start(tmp_path, name):
    (tmp_path / name).mkdir()

    with pytest.raises(ModelError, match=rf"no valid checkpoint .* '{name}'"):
        retention.latest_valid_step(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "007", "-1", "٣", "x.partial"])
def test_what_has_no_name_of_a_step_is_left_alone(tmp_path, name):
    saved(tmp_path, 1)
    (tmp_path / name).mkdir()

    assert retention.latest_valid_step(tmp_path) == (1, [])
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("kind", ["folder", "file", "link", "copy"])
def test_an_alien_with_the_name_of_a_step_is_set_aside(tmp_path, kind):
    saved(tmp_path, 1)
    alien = tmp_path / "999999"
    if kind == "folder":
        alien.mkdir()
    elif kind == "file":
        alien.write_text("x")
    elif kind == "link":
        alien.symlink_to(tmp_path / "1")
    else:
        alien.mkdir()
        for path in (tmp_path / "1").iterdir():
            (alien / path.name).write_bytes(path.read_bytes())

    step, (complaint,) = retention.latest_valid_step(tmp_path)

    assert step == 1
    assert "checkpoint 999999 is damaged" in complaint
    assert [*tmp_path.glob("999999*")] == [tmp_path / "999999.damaged"]


def test_a_link_in_a_step_is_refused_even_if_it_leads_to_the_same(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "file").rename(tmp_path / "elsewhere")
    (tmp_path / "2" / "file").symlink_to(tmp_path / "elsewhere")

    step, (complaint,) = retention.latest_valid_step(tmp_path)

    assert step == 1
    assert "'file' is neither a file nor a folder" in complaint


def test_the_newest_are_kept_but_never_fewer_than_two(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    retention.apply_retention(tmp_path, 4, keep=3)
    assert retention.list_steps(tmp_path) == [2, 3, 4]

    retention.apply_retention(tmp_path, 4, keep=1)

    assert retention.list_steps(tmp_path) == [3, 4]


def test_one_that_was_altered_since_does_not_count_among_the_two(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    damage(tmp_path, 3)

    retention.apply_retention(tmp_path, 4, keep=2)

    assert retention.list_steps(tmp_path) == [2, 3, 4]


def test_nothing_is_deleted_while_only_the_newest_verifies(tmp_path):
    saved(tmp_path, 1, 2, 3)
    for step in (1, 2):
        damage(tmp_path, step)

    retention.apply_retention(tmp_path, 3, keep=2)

    assert retention.list_steps(tmp_path) == [1, 2, 3]


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path):
    saved(tmp_path, 1)
    damage(tmp_path, 1)

    saved(tmp_path, 1)

    assert retention.latest_valid_step(tmp_path) == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_step_that_was_to_be_replaced_counts_until_it_is(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "1").rename(tmp_path / "1.replaced")

    assert retention.latest_valid_step(tmp_path) == (1, [])
