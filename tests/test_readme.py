"""README.md: its Python runs, its commands parse, and the files it names exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from gptjax import config
from gptjax.cli.main import parse_command
from gptjax.config import find_config, load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = ("pip install -e . && gptjax quickstart", 'pip install -e ".[test]" && pytest')


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def small_config(path):
    """Loads a config, for two steps."""
    loaded = load_config(path)
    model = dataclasses.replace(loaded.model, context_length=32)  # as that of the first block
    train = dataclasses.replace(loaded.train, steps=2, eval_batches=1, sample_prompt="")
    optim = dataclasses.replace(loaded.optim, warmup_steps=1)
    return dataclasses.replace(loaded, model=model, train=train, optim=optim)


def command_lines():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("gptjax ")]


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "load_config", small_config)
    scope = {}

    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)

    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").is_file()
    assert "(2, 1, 2, 22, 22)" in capsys.readouterr().out


@pytest.mark.parametrize("line", command_lines())
def test_the_commands_parse(line):
    _, arguments = parse_command(shlex.split(line, comments=True)[1:])

    if "config_name" in arguments:
        load_config(find_config(arguments["config_name"]))


def test_the_set_up_commands_and_the_configs_that_it_names_are_complete():
    assert set(COMMANDS) <= {block.strip() for block in blocks("bash")}
    names = re.findall(r"`?gptjax train ([\w/]+)", README)
    assert {"text", "classify/csv"} <= set(names)
    for name in names:
        load_config(find_config(name))


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
