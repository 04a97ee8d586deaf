"""Expected results of configs, and `gptjax check`."""

import dataclasses
import re
import tomllib

import pytest
import tomli_w

from gptjax.cli.main import main
from gptjax.config import (
    CheckpointConfig,
    RunConfig,
    builtin_config_dir,
    config_options,
    find_config,
    from_dict,
    load_config,
)
from gptjax.errors import ConfigError
from gptjax.training.expected_results import record_changes
from gptjax.training.metrics import log_event

CONFIGS = sorted(builtin_config_dir().rglob("*.toml"))
# Trains on the user's text, or its results are not measured yet.
WITHOUT_RESULTS = {"gpt2_124m"}


def write_config(path, **expect):
    """Config file with expected results."""
    table = {"train": {"steps": 2, "seed": 3}, "expect": {"validation_loss": [1.0, 2.0]} | expect}
    path.write_text(tomli_w.dumps(table))
    return path


def write_run(run_dir, config, loss):
    """Files of a finished run."""
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(tomli_w.dumps(dataclasses.asdict(record_changes(config))))
    (run_dir / "report.md").touch()
    for step, value in ((0, 9.0), (2, loss)):
        log_event(run_dir / "metrics.jsonl", "eval", step, split="validation", loss=value)


@pytest.mark.parametrize(("loss", "exit_code"), [(1.0, 0), (2.0, 0), (2.1, 1), (float("nan"), 1)])
def test_a_run_is_checked_by_its_last_evaluation(tmp_path, capsys, loss, exit_code):
    origin = {"date": "2026-01-02", "machine": "a machine", "commit": "abc1234"}
    config = load_config(write_config(tmp_path / "mine.toml", **origin))
    write_run(tmp_path / "run", config, loss)

    assert main(["check", str(tmp_path / "run")]) == exit_code

    out = capsys.readouterr().out
    assert all(word in out for word in ("mine.toml", *origin.values(), "validation_loss", "1 to 2"))
    assert f"{loss:.4f}" in out


def test_results_are_not_expected_of_a_run_with_other_options(tmp_path, capsys):
    config = load_config(write_config(tmp_path / "mine.toml", may_differ=["train.seed"]))
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=1, seed=5),
        checkpoint=CheckpointConfig(keep=7),
    )
    write_run(tmp_path / "run", config, 1.5)

    assert main(["check", str(tmp_path / "run")]) == 2

    assert "train.steps: 2 -> 1" in capsys.readouterr().err
    assert record_changes(config).expect.changes == ("train.steps: 2 -> 1",)


def test_a_run_without_expected_results_or_end_is_invalid_input(tmp_path, capsys):
    write_run(tmp_path / "none", RunConfig(), 1.5)
    config = load_config(write_config(tmp_path / "mine.toml"))
    write_run(tmp_path / "unfinished", config, 1.5)
    (tmp_path / "unfinished" / "report.md").unlink()

    assert main(["check", str(tmp_path / "none")]) == 2
    assert "[expect]" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "unfinished")]) == 2
    assert "not finished" in capsys.readouterr().err


def test_a_result_that_the_run_did_not_measure_is_not_met(tmp_path, capsys):
    config = load_config(write_config(tmp_path / "mine.toml", test_accuracy=[0.5, 1.0]))
    write_run(tmp_path / "run", config, 1.5)

    assert main(["check", str(tmp_path / "run")]) == 1
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize("bounds", [[1.0], [2.0, 1.0], [1, 2, 3], 1.5, ["a", "b"]])
def test_a_result_has_two_bounds_in_order(bounds):
    with pytest.raises(ConfigError, match=r"expect\.validation_loss"):
        from_dict(RunConfig, {"expect": {"validation_loss": bounds}})


def test_the_name_of_a_config_and_its_results_survive_a_round_trip(tmp_path):
    config = load_config(find_config("tiny"))
    assert config.expect.config == "tiny"
    text = tomli_w.dumps(dataclasses.asdict(config))

    assert from_dict(RunConfig, tomllib.loads(text)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_says_what_to_expect_since_when_and_from_where(path):
    expect = load_config(path).expect
    if path.stem in WITHOUT_RESULTS:
        return
    assert expect.results()
    assert set(expect.may_differ) <= config_options().keys()
    assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", expect.date)
    assert expect.machine
    assert expect.commit
