"""The README's Python runs as it stands there, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from gptjax.cli import make_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}

    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)

    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert "(2, 1, 2, 22, 22)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [x for b in blocks("bash") for x in b.splitlines() if x[:7] == "gptjax "]
)
def test_the_commands_are_ones_that_gptjax_has(line):
    words = shlex.split(line, comments=True)[1:]
    args, rest = make_parser().parse_known_args(words)

    assert callable(args.command)
    assert not rest or words[0] in ("train", "plan", "launch")


def test_files_that_the_readme_names_exist():
    root = Path(__file__).resolve().parent.parent

    for name in re.findall(r"`(gptjax/[\w/]+\.py|\.ci/run)`", README):
        assert (root / name).is_file(), name
