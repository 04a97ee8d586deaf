"""Options and inputs that may change when a run is resumed; one writer per run."""

import dataclasses
import errno
import fcntl
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.cli.main import main
from gptjax.config import RunConfig, from_dict
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.fileio.atomic import remove_path
from gptjax.tasks import pretrain
from gptjax.tasks.sft import SFT
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training import run_dir
from gptjax.weights.model_folder import save
from tests.runs import make_task
from tests.small_models import make_model
from tests.tasks.test_sft import make_config

POLICIES = {
    "identity": ("model.n_layers", "data.source", "data.tokenizer", "data.split_seed"),
    "trajectory": ("optim.peak_lr", "data.batch_size", "model.dtype", "train.steps", "on-spike"),
    "operational": ("train.sample_prompt", "checkpoint.keep", "mesh.data", "mesh.tensor"),
}


def test_an_option_may_change_as_its_policy_says(tmp_path):
    for policy, names in POLICIES.items():
        assert {run_dir.resume_policy(name) for name in names} == {policy}
    run_dir.reconcile_config(tmp_path, RunConfig())
    config_toml = (tmp_path / "config.toml").read_text()

    moved = from_dict(RunConfig, {"mesh": {"fsdp": 2}})
    assert run_dir.reconcile_config(tmp_path, moved) == ["mesh.fsdp: 1 -> 2"]
    assert (tmp_path / "config.toml").read_text() == config_toml

    slower = from_dict(RunConfig, {"optim": {"peak_lr": 1e-5}})
    change = "optim.peak_lr: 0.0006 -> 1e-05"
    with pytest.raises(ModelError, match=r"--allow-change optim\.peak_lr"):
        run_dir.reconcile_config(tmp_path, slower)
    assert run_dir.reconcile_config(tmp_path, slower, ["optim.peak_lr"]) == [change]
    assert run_dir.reconcile_config(tmp_path, slower) == []

    deeper = from_dict(RunConfig, {"optim": {"peak_lr": 1e-5}, "model": {"n_layers": 3}})
    with pytest.raises(ModelError, match=r"model\.n_layers: 12 -> 3"):
        run_dir.reconcile_config(tmp_path, deeper)
    with pytest.raises(ConfigError, match=r"model\.n_layers is fixed"):
        run_dir.reconcile_config(tmp_path, deeper, ["model.n_layers"])
    with pytest.raises(ConfigError, match=r"optim\.peak_lr\?"):
        run_dir.reconcile_config(tmp_path, slower, ["optim.peak_lrs"])


def test_the_spike_policy_of_a_run_changes_only_if_allowed(tmp_path):
    assert run_dir.reconcile_spike_policy(tmp_path, "") == "log"
    (tmp_path / "meta.json").write_text('{"on_spike": "skip", "started": "now"}')

    assert run_dir.reconcile_spike_policy(tmp_path, "") == "skip"
    with pytest.raises(ModelError, match="--allow-change on-spike"):
        run_dir.reconcile_spike_policy(tmp_path, "log")
    with pytest.raises(ConfigError, match="--on-spike ignore"):
        run_dir.reconcile_spike_policy(tmp_path, "ignore")
    assert run_dir.reconcile_spike_policy(tmp_path, "log", ["on-spike"]) == "log"
    assert run_dir.read_run_metadata(tmp_path) == {"on_spike": "log", "started": "now"}


def test_a_changed_input_is_rejected_with_its_option_and_values(tmp_path):
    provenance = {name: {"rows": 3, "hash": "1" * 64} for name in run_dir.TRACKED_INPUTS}
    run_dir.check_provenance(tmp_path, provenance)  # a new run
    for recorded in ({}, provenance):
        (tmp_path / "meta.json").write_text(json.dumps(recorded))
        run_dir.check_provenance(tmp_path, {**provenance, "devices": 8})

    for name, (_, option) in run_dir.TRACKED_INPUTS.items():
        for now, shown in ((None, "none"), ("3" * 64, "3333")):
            with pytest.raises(ModelError, match=f"{option}.* now {shown}"):
                run_dir.check_provenance(tmp_path, {**provenance, name: now})
    for text in ("", "[1]", "[]", "{" * 100_000, '{"a": 1, "a": 2}'):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ModelError, match=r"meta\.json"):
            run_dir.check_provenance(tmp_path, provenance)


def test_hashes_depend_on_names_shapes_dtypes_values_and_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    near = np.where(array == 5, np.nextafter(array, 9), array)
    arrays = [array, array.T, array.reshape(3, 2), array.view(np.int32), near]
    trees = [{"b": array}, *({"a": value} for value in arrays)]
    rows = [[], [1, 2], [12], ["ab"], ["a", "b"], ["b", "a"], [["a", "b"]], ["a", "b", "b"]]

    assert len({run_dir.hash_pytree(tree) for tree in trees}) == len(trees)
    assert len({run_dir.hash_rows(part)["sha256"] for part in rows}) == len(rows)


def test_the_provenance_of_a_run_has_all_its_inputs(tmp_path):
    model, start = make_model(context_length=64, n_layers=1), tmp_path / "start"
    rows, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    template.write_text(load_chat_template("qa").source)
    save(model, start)
    files = {"finetune__init_from": str(start), "data__chat_template": str(template)}
    config = make_config(tmp_path, **files)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1, model.params))
    changes = {
        "start": lambda: save(other, start),
        "data": lambda: rows.write_text(rows.read_text().replace("first sky", "first sly")),
        "template": lambda: template.write_text(template.read_text() + "\n{# changed #}"),
    }

    before = make_task(SFT, config, tmp_path)[2].provenance
    for name, change in changes.items():
        change()
        after = make_task(SFT, config, tmp_path)[2].provenance
        assert {key for key in run_dir.TRACKED_INPUTS if after[key] != before[key]} == {name}
        before = after


def test_a_start_that_fails_leaves_no_folder_and_contradictions_fail_before_any_work(
    tmp_path, monkeypatch
):
    started, folder = [], tmp_path / "runs" / "new"
    train = ["train", "tiny", "--run", str(folder), "--train.steps", "5"]

    def read(*args):
        started.append((folder / ".lock").is_file())
        (folder / "data").mkdir()
        raise DataError("no text")

    monkeypatch.setattr(pretrain, "open_dataset", read)
    for words in (
        ["--optim.warmup_steps", "10"],
        ["--data.tokenizer", "bpe:12"],
        ["--mesh.data", "8", "--data.batch_size", "12"],
        ["--data.batching", "padded"],
        ["--train.task", "classify", "--data.val_fraction", "0.9"],
        ["--run", str(tmp_path / "\udcff")],  # of bytes that are not UTF-8
    ):
        assert main([*train, "--optim.warmup_steps", "2", *words]) == 2
        assert not started
        assert not any(tmp_path.iterdir())
    assert main([*train, "--optim.warmup_steps", "2"]) == 2
    assert started == [True]
    assert not any(tmp_path.iterdir())

    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    run_dir.reconcile_config(folder, RunConfig())
    assert main([*train, "--optim.warmup_steps", "2"]) == 2  # another run
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "config.toml"}
    assert len(started) == 1


def test_a_second_writer_learns_who_the_first_is(tmp_path, capsys):
    for _ in range(2):  # the lock is released
        with run_dir.run_lock(tmp_path):
            assert main(["train", "tiny", "--run", str(tmp_path)]) == 2
        owner = f"pid {os.getpid()} on {os.uname().nodename}, started 20"
        assert f"{tmp_path}: {owner}" in capsys.readouterr().err


def test_a_run_starts_on_a_file_system_without_locks_and_follows_no_link(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks")

    path, precious = tmp_path / run_dir.RUN_LOCK_FILE, tmp_path / "precious"
    monkeypatch.setattr(fcntl, "flock", flock)
    with run_dir.run_lock(tmp_path):
        assert f"pid {os.getpid()} on" in path.read_text()
    path.unlink()
    precious.write_text("precious")
    path.symlink_to(precious)

    with pytest.raises(ModelError, match=str(path)), run_dir.run_lock(tmp_path):
        pytest.fail("the lock was acquired")
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", [*run_dir.RUN_FILES, *run_dir.RUN_FOLDERS])
def test_what_is_not_a_file_or_folder_of_a_run_is_an_error_before_any_work(tmp_path, name):
    makers = [os.mkfifo, Path.touch if name in run_dir.RUN_FOLDERS else os.mkdir]
    for make in makers:
        make(tmp_path / name)

        with pytest.raises(ModelError, match=name), run_dir.run_lock(tmp_path):
            pytest.fail("the lock was acquired")
        remove_path(tmp_path / name)
