"""Properties of the notebooks in colab/ that need no run."""

import ast
import importlib
import json
import logging
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

FOLDER = Path(__file__).resolve().parents[2] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ROOT = FOLDER.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
INSTALL = f"""\
# Installs gptjax from this clone or, outside of a clone, from its repository.
import sys
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = "{REPOSITORY}"
folders = [Path.cwd(), *Path.cwd().parents]
clones = [f for f in folders if (f / "colab" / "set_repository.py").is_file()]
if not list(distributions(name="gptjax")):
    if not clones and "/OWNER/" in REPOSITORY:
        raise RuntimeError("No repository yet: run colab/set_repository.py in a clone.")
    source = f'-e "{{clones[0]}}"' if clones else f"git+{{REPOSITORY}}"
    %pip install -q {{source}}
    sys.path += map(str, clones[:1])  # a later kernel needs no path"""
START = """\
%load_ext gptjax
%matplotlib inline
import os

import jax

import gptjax

FAST = bool(os.environ.get("GPTJAX_FAST"))  # set by the tests: fewer steps
print(jax.devices())"""
SLUG = "/".join(REPOSITORY.split("/")[-2:])
PAGE = f"github{{}}/{SLUG}/blob/main/colab/{{}}"
BADGES = ("https://colab.research.google.com/" + PAGE, "=https://" + PAGE)
# Packages that every runtime has, or that gptjax installs.
KNOWN = {"gptjax", "jax", "numpy", "optax", "matplotlib", "huggingface_hub", "google"}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def sources(path, kind="code"):
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


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
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell["metadata"] == {}
    assert set(notebook["metadata"]) == {"accelerator", "colab", "kernelspec", "language_info"}

    first, *_ = sources(path, "markdown")
    install, *rest = sources(path)
    for badge, site in zip(BADGES, ("", ".com"), strict=True):
        assert badge.format(site, path.name) + ")" in first
    assert install == INSTALL
    assert START in rest[:2]  # notebook 08 chooses the devices before


@each
def test_its_imports_and_links_exist(path):
    nodes = [node for tree in trees(path) for node in ast.walk(tree)]
    names = [x.name for n in nodes if isinstance(n, ast.Import) for x in n.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    used = {name.split(".")[0] for name in (*names, *(n.module for n in froms))}

    assert used <= KNOWN | sys.stdlib_module_names
    for node in froms:
        for name in [alias.name for alias in node.names if node.module != "google.colab"]:
            assert hasattr(importlib.import_module(node.module), name), name
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name("gptjax"), attr=name):
                assert hasattr(gptjax, name), name
    for name in re.findall(r"\]\((?!https)([^)]*)\)", "\n".join(sources(path, "markdown"))):
        assert (FOLDER / name).is_file(), name


@each
def test_its_parameters_are_forms_of_colab_and_its_result_is_downloaded(path):
    form = re.compile(r"^(\w+) = (.+?)  # @param (\[.*?\])? ?(\{.*\})?$", re.MULTILINE)
    text = "\n".join(sources(path))
    forms = form.findall(text)

    assert len(forms) == text.count("@param")
    for _, value, choices, options in forms:
        assert not choices or ast.literal_eval(value) in json.loads(choices)
        assert choices or json.loads(options)["type"] in {"integer", "string", "boolean"}
    assert "from google.colab" in sources(path)[-1]


@pytest.fixture
def shell():
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "gptjax")
    yield shell
    unload_ipython_extension(shell)


def test_the_magic_runs_commands_in_the_process_of_the_notebook(shell, capsys):
    shell.run_line_magic("gptjax", "plan tiny --topology v5e:1 --no-compile")
    assert "devices  1 x TPU v5 lite" in capsys.readouterr().out

    with pytest.raises(UsageError, match=r"train tiny --train.stepz 3: exit code 2"):
        shell.run_line_magic("gptjax", "train tiny --train.stepz 3")
    assert "--train.stepz" in capsys.readouterr().err

    # Progress is printed once, whether a function or a command trains.
    logging.getLogger("gptjax").info("from a function")
    with log_to_stdout():
        logging.getLogger("gptjax").info("from a command")
    assert capsys.readouterr().out == "from a function\nfrom a command\n"


@pytest.fixture
def clone(tmp_path):
    """The files that hold the address of the repository."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(FOLDER, tmp_path / "colab")
    shutil.copytree(ROOT / "configs" / "launch", tmp_path / "configs" / "launch")
    return tmp_path


def set_repository(clone, argument):
    command = [sys.executable, clone / "colab" / "set_repository.py", argument]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_script_sets_the_repository_everywhere_and_again(clone):
    url = "https://github.com/some-one/gpt.jax"
    for argument in ("a/b", "some-one/gpt.jax"):
        result = set_repository(clone, argument)
        assert (result.returncode, len(result.stdout.splitlines())) == (0, 15)

    assert f'Repository = "{url}"' in (clone / "pyproject.toml").read_text("utf-8")
    notebooks = list(clone.glob("colab/*.ipynb"))
    for path in [*notebooks, *clone.glob("configs/*/*"), clone / "README.md"]:
        text = path.read_text("utf-8")
        assert path.parent.name == "launch" or url in text
        assert "OWNER/NAME" not in text
        assert "/a/b" not in text
    for path in notebooks:
        assert sources(path)[0] == INSTALL.replace(REPOSITORY, url)
        badges = f"/some-one/gpt.jax/blob/main/colab/{path.name}"
        assert sources(path, "markdown")[0].count(badges) == 2
    assert set_repository(clone, url + ".git").stdout == ""  # nothing changes


def test_the_repository_can_be_a_folder_and_nothing_else(clone):
    for argument in ("a", "a/b/c", "http://x.y/a/b", 'https://x/"a', "-h"):
        assert set_repository(clone, argument).returncode == 1
        for path in clone.glob("colab/*.ipynb"):
            assert path.read_text("utf-8") == (FOLDER / path.name).read_text("utf-8")

    assert set_repository(clone, "file:///tmp/gptjax.git/").returncode == 0

    for path in clone.glob("colab/*.ipynb"):
        assert 'REPOSITORY = "file:///tmp/gptjax"' in sources(path)[0]
        assert f"/{SLUG}/blob" in sources(path, "markdown")[0]  # the badges stay
