"""README.md: its Python runs, its commands parse, and the files it names exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import click
import pytest

from gptjax import config
from gptjax.cli.main import parse_command
from gptjax.config import find_config, load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = ("pip install -e . && gptjax quickstart", 'pip install -e ".[test]" && pytest')


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def with_options(path, options):
    """Loads a config, with other values for some options."""
    run_config = load_config(path)
    for name, value in options:
        section, _, key = name.partition(".")
        changed = dataclasses.replace(getattr(run_config, section), **{key: value})
        run_config = dataclasses.replace(run_config, **{section: changed})
    return run_config


def command_lines():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("gptjax ")]


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = [("train.steps", 2), ("optim.warmup_steps", 1), ("train.sample_prompt", "")]
    monkeypatch.setattr(config, "load_config", lambda path: with_options(path, short))
    scope = {}

    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)

    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").is_file()
    assert "(2, 1, 2, 22, 22)" in capsys.readouterr().out


@pytest.mark.parametrize("line", command_lines())
def test_the_commands_parse(line):
    command, arguments = parse_command(shlex.split(line, comments=True)[1:])

    assert isinstance(command, click.Command)
    if "config_name" in arguments:
        assert find_config(arguments["config_name"]).is_file()


def test_the_configs_that_it_names_load():
    names = re.findall(r"`?gptjax train ([\w/]+)", README)

    assert {"text", "classify/csv"} <= set(names)
    for name in names:
        load_config(find_config(name))


def test_the_set_up_commands_are_complete():
    bash = [block.strip() for block in blocks("bash")]

    assert set(COMMANDS) <= set(bash)


def test_the_files_that_it_names_exist():
    links = re.findall(r"\]\((?!https)([^)]*)\)", README)
    paths = re.findall(r"`((?:gptjax|configs|tests|colab)/[\w/.]*)`", README)

    assert links
    assert paths
    for name in (*links, *paths):
        assert (ROOT / name).exists(), name


def test_the_tree_lists_all_packages():
    (tree,) = [block for block in blocks("text") if block.startswith("gptjax/\n")]
    packages = {path.parent.name for path in (ROOT / "gptjax").glob("*/__init__.py")}

    assert packages <= set(re.findall(r"(\w+)/", tree))
