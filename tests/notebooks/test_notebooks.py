"""Properties of the notebooks in colab/ that need no run."""

import ast
import importlib
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
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell

import gptjax
from gptjax.cli.notebook import unload_ipython_extension
from gptjax.cli.session import log_to_stdout
from gptjax.training.task import logger

FOLDER = Path(__file__).resolve().parents[2] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ROOT = FOLDER.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
PAGE = "github{}/{}/blob/main/colab/{}"
BADGES = ("https://colab.research.google.com/" + PAGE, "=https://" + PAGE)
# Packages that every runtime has, or that gptjax installs.
KNOWN = {"gptjax", "jax", "numpy", "optax", "matplotlib", "huggingface_hub", "google"}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def sources(path, kind="code"):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == kind]


INSTALL, START, *_ = sources(NOTEBOOKS[0])


def trees(path):
    """The syntax trees of the code cells, magics turned into calls."""
    transform = TransformerManager().transform_cell
    return [ast.parse(transform(source)) for source in sources(path)]


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
def test_its_imports_and_links_exist(path):
    nodes = [node for tree in trees(path) for node in ast.walk(tree)]
    names = [x.name for n in nodes if isinstance(n, ast.Import) for x in n.names]
    froms = [(n.module, x.name) for n in nodes if isinstance(n, ast.ImportFrom) for x in n.names]
    used = {name.split(".")[0] for name in (*names, *(module for module, _ in froms))}

    assert used <= KNOWN | sys.stdlib_module_names
    for module, name in froms:
        assert module == "google.colab" or hasattr(importlib.import_module(module), name), name
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name("gptjax"), attr=name):
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

    # Progress is printed once, whether a function or a command trains.
    logger.info("from a function")
    with log_to_stdout():
        logger.info("from a command")
    unload_ipython_extension(shell)
    logger.info("afterwards")
    assert capsys.readouterr().out == "from a function\nfrom a command\n"


def test_one_script_sets_the_repository_everywhere_and_again(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("colab", "configs/launch"):
        shutil.copytree(ROOT / name, tmp_path / name)

    def set_repository(argument):
        command = [sys.executable, tmp_path / "colab" / "set_repository.py", argument]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for argument in ("a/b/c", "http://x.y/a/b", 'https://x/"a'):
        assert set_repository(argument).returncode == 1
    url = "https://github.com/some-one/gpt.jax"
    for argument in ("a/b", "some-one/gpt.jax"):
        assert set_repository(argument).returncode == 0
    assert set_repository(url + ".git").stdout == ""  # nothing changes
    notebooks = list(tmp_path.glob("colab/*.ipynb"))
    for path in [*notebooks, *tmp_path.glob("configs/*/*"), tmp_path / "README.md"]:
        text = path.read_text("utf-8")
        assert path.parent.name == "launch" or url in text
        assert "OWNER/NAME" not in text
        assert "/a/b" not in text
    assert f'Repository = "{url}"' in (tmp_path / "pyproject.toml").read_text("utf-8")
