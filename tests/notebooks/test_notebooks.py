"""Properties of the notebooks in colab/ that need no run."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import gptjax

FOLDER = Path(__file__).resolve().parents[2] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ROOT = FOLDER.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
PAGE = "github{}/{}/blob/main/colab/{}"
BADGES = ("https://colab.research.google.com/" + PAGE, "=https://" + PAGE)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def sources(path, kind="code"):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == kind]


INSTALL, START, *_ = sources(NOTEBOOKS[0])


@each
def test_it_is_stored_without_outputs_and_begins_with_the_installation(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert not [cell for cell in notebook["cells"] if cell.get("outputs") or cell["metadata"]]
    first, *_ = sources(path, "markdown")
    install, *rest = sources(path)
    for badge, site in zip(BADGES, ("", ".com"), strict=True):
        slug = "/".join(REPOSITORY.split("/")[-2:])
        assert badge.format(site, slug, path.name) + ")" in first
    assert install == INSTALL
    assert f'REPOSITORY = "{REPOSITORY}"' in install
    assert START in rest[:2]  # notebook 08 chooses the devices before
    assert "from google.colab" in rest[-1]  # downloads the result


@each
def test_the_names_of_gptjax_and_the_links_exist(path):
    for name in re.findall(r"\bgptjax\.(\w+)\(", "\n".join(sources(path))):
        assert hasattr(gptjax, name), name
    for name in re.findall(r"\]\((?!https)([^)]*)\)", "\n".join(sources(path, "markdown"))):
        assert (FOLDER / name).is_file(), name


def test_the_magic_runs_commands_in_the_process_of_the_notebook(capsys):
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "gptjax")
    shell.run_line_magic("gptjax", "plan tiny --topology v5e:1 --no-compile")
    assert "devices  1 x TPU v5 lite" in capsys.readouterr().out

    with pytest.raises(UsageError, match=r"train tiny --train.stepz 3: exit code 2"):
        shell.run_line_magic("gptjax", "train tiny --train.stepz 3")
    assert "--train.stepz" in capsys.readouterr().err


def test_one_script_sets_the_repository_everywhere_and_again(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("colab", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)

    def set_repository(argument):
        command = [sys.executable, tmp_path / "colab" / "set_repository.py", argument]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert set_repository('https://x/"a').returncode == 1
    url = "https://github.com/some-one/gpt.jax"
    for argument in ("a/b", "some-one/gpt.jax"):
        assert set_repository(argument).returncode == 0
    assert set_repository(url + ".git").stdout == ""  # nothing changes
    for path in [*tmp_path.glob("colab/*.ipynb"), *tmp_path.glob("*.*")]:
        text = path.read_text("utf-8")
        assert url in text
        assert "OWNER/NAME" not in text
        assert "/a/b" not in text
    for path in tmp_path.glob("configs/launch/*"):
        assert "OWNER/NAME" not in path.read_text("utf-8")
