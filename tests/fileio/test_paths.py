"""Paths of users: one function expands them."""

import ast
from pathlib import Path

import click
import pytest

from gptjax.cli.arguments import PATH
from gptjax.config import load_config
from gptjax.errors import ConfigError
from gptjax.fileio.paths import user_cache_dir, user_path
from gptjax.tokenizer.tokenizer import load_tokenizer
from gptjax.weights.load import load
from gptjax.weights.model_folder import save
from tests.small_models import make_model
from tests.test_style import PACKAGE


def test_a_home_directory_is_expanded_everywhere_by_one_function(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GPTJAX_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    model = make_model()

    save(model, "~/model")

    assert load("~/model").config == model.config
    assert load_tokenizer("~/model").hash == model.tokenizer.hash
    (tmp_path / "run.toml").write_text("train.steps = 7")
    assert load_config("~/run.toml").train.steps == 7
    assert PATH.convert("~/a", None, click.Context(click.Command("x"))) == tmp_path / "a"
    assert user_cache_dir("xla") == tmp_path / ".cache" / "gptjax" / "xla"
    assert not Path("~").exists()
    users = [
        module
        for module, tree in PACKAGE.items()
        if any(getattr(node, "attr", "") == "expanduser" for node in ast.walk(tree))
    ]
    assert users == ["fileio.paths"]


def test_impossible_paths_are_errors(monkeypatch):
    with pytest.raises(ConfigError, match=r"a\\x00b"):
        user_path("a\0b")
    for read in (user_path, load, load_config, lambda name: PATH.convert(name, None, None)):
        with pytest.raises(ConfigError, match="empty"):
            read("")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user id without an entry
    with pytest.raises(ConfigError, match="~/x"):
        user_path("~/x")
    assert user_path("x") == Path("x")
