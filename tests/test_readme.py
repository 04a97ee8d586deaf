"""The README's Python runs as it stands there, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

from gptjax.cli.main import make_parser
from gptjax.config import find_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


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


def test_the_runs_that_it_names_are_configs():
    names = re.findall(r"`gptjax train ([\w/]+)`", README)

    assert len(names) >= 4
    for name in names:
        assert find_config(name).is_file()


def test_the_files_that_it_names_exist():
    links = re.findall(r"\]\((?!https)([^)]*)\)", README)

    assert len(links) > 15
    for name in (*links, *re.findall(r"`(gptjax/[\w/]+\.py|\.ci/run)`", README)):
        assert (ROOT / name).is_file(), name
    code = re.findall(r"^\|[^|]*\|([^|]*)\|", README, re.MULTILINE)
    for name in re.findall(r"`(\w+(?:\.py|/))`", "".join(code)):
        assert (ROOT / "gptjax" / name).exists(), name


def test_the_files_to_read_are_as_long_as_it_says():
    rows = re.findall(r"^\| (`gptjax/.*?`) \| (\d+) \|", README, re.MULTILINE)

    assert len(rows) >= 8
    for names, said in rows:
        files = [ROOT / name for name in re.findall("`(.*?)`", names)]
        lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
        assert abs(lines - int(said)) <= 0.1 * lines, names


def test_it_is_short_and_its_pictures_are_small():
    pictures = sorted((ROOT / "colab" / "pictures").iterdir())

    assert len(README.splitlines()) <= 200
    assert {f"colab/pictures/{p.name}" for p in pictures} == {
        *re.findall(r"!\[[^]]+\]\((.*?)\)", README)
    }
    assert sum(picture.stat().st_size for picture in pictures) < 200_000
