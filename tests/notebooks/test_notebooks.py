"""What every notebook in colab/ is like, before any is run."""

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
# What every runtime has, or gptjax brings.
KNOWN = {"gptjax", "jax", "numpy", "optax", "matplotlib", "huggingface_hub"}
STANDARD = {
    *("csv", "dataclasses", "importlib", "json", "logging", "math", "os"),
    *("pathlib", "shutil", "signal"),
    *("statistics", "sys", "urllib"),
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def sources(path, kind="code"):
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def trees(path):
    """The syntax trees of the code cells, magics turned into calls."""
    transform = TransformerManager().transform_cell
    return [ast.parse(transform(source)) for source in sources(path)]


def test_the_ten_of_them_are_there():
    numbers = [int(path.stem[:2]) for path in NOTEBOOKS]

    assert numbers == list(range(10))


@each
def test_it_is_stored_as_one_form_of_its_content_and_without_results(path):
    """How to get there is in CONTRIBUTING.md."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))

    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert len(text) < 40_000
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or not cell["outputs"]
        assert cell.get("execution_count") is None
        assert cell["metadata"] == {}
    assert set(notebook["metadata"]) == {*("accelerator", "colab", "kernelspec", "language_info")}


@each
def test_it_begins_with_its_badges_an_install_that_leaves_jax_alone_and_the_devices(path):
    first, *_ = sources(path, "markdown")
    install, *rest = sources(path)

    assert first.startswith("# ")
    for badge, site in zip(BADGES, ("", ".com"), strict=True):
        assert badge.format(site, path.name) + ")" in first
    assert install == INSTALL
    assert START in rest[:2]  # a choice of devices comes before it
    assert len(re.findall(r"\bpip\b", "\n".join(sources(path)))) == 1
    assert " -U" not in install


@each
def test_its_cells_are_python_short_and_hide_nothing(path):
    for source, tree in zip(sources(path), trees(path), strict=True):
        assert source == INSTALL or len(source.splitlines()) <= 13, source
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 6, node.name
            assert not isinstance(node, ast.ClassDef)


@each
def test_what_it_imports_exists(path):
    nodes = [node for tree in trees(path) for node in ast.walk(tree)]
    names = [x.name for n in nodes if isinstance(n, ast.Import) for x in n.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    used = {name.split(".")[0] for name in (*names, *(n.module for n in froms))}

    assert used <= KNOWN | STANDARD | {"google"}
    for node in froms:
        if node.module == "google.colab":  # only asked for where it is
            assert {alias.name for alias in node.names} <= {"drive", "files"}
            continue
        for name in [alias.name for alias in node.names]:
            assert hasattr(importlib.import_module(node.module), name), name
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name("gptjax"), attr=name):
                assert hasattr(gptjax, name), name


@each
def test_its_knobs_are_few_and_colab_can_draw_them(path):
    form = re.compile(r"^(\w+) = (.+?)  # @param (\[.*?\])? ?(\{.*\})?$", re.MULTILINE)
    knobs = [knob for source in sources(path) for knob in form.findall(source)]

    assert len(knobs) == "\n".join(sources(path)).count("@param")
    assert 3 <= len(knobs) <= 5
    for _, value, choices, options in knobs:
        if choices:
            assert ast.literal_eval(value) in json.loads(choices)
        asked = json.loads(options or "{}")
        assert choices or asked["type"] in {"integer", "string", "boolean"}
        assert asked.keys() <= {"type", "allow-input", "placeholder"}


@each
def test_it_says_what_to_expect_and_hands_over_the_result_at_its_end(path):
    *_, last = sources(path)
    tests = [node for tree in trees(path) for node in ast.walk(tree)]

    assert sum(isinstance(node, ast.Assert) for node in tests) >= 2
    assert 'if "google.colab" in sys.modules:\n    from google.colab' in last
    assert "    files.download(" in last


@each
def test_it_needs_no_secret(path):
    text = "\n".join(sources(path))

    assert not re.search(r"userdata|getpass|api_key|token=|notebook_login", text)


@each
def test_the_pages_that_it_points_to_are_there(path):
    text = "\n".join(sources(path, "markdown"))

    for name in re.findall(r"\]\((?!https)([^)]*)\)", text):
        assert (FOLDER / name).is_file(), name


@pytest.fixture
def shell():
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "gptjax")
    yield shell
    unload_ipython_extension(shell)


def test_the_command_line_runs_in_the_notebooks_own_process(shell, capsys):
    shell.run_line_magic("gptjax", "plan tiny --topology v5e:1 --no-compile")

    assert "devices  1 x TPU v5 lite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [("train tiny --train.stepz 3", 2, "--train.stepz"), ("trane tiny", 2, "'trane'")],
)
def test_a_command_that_fails_stops_the_cells_below_in_one_line(line, code, said, shell, capsys):
    with pytest.raises(UsageError, match=f"gptjax {line}: exit code {code}, see above"):
        shell.run_line_magic("gptjax", line)

    assert said in capsys.readouterr().err


def test_progress_is_printed_once_whether_a_function_or_a_command_trains(shell, capsys):
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


def set_repository(clone, *arguments):
    script = clone / "colab" / "set_repository.py"
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_script_sets_the_repository_everywhere_and_again(clone):
    url = "https://github.com/some-one/gpt.jax"
    for argument in ("a/b", "some-one/gpt.jax"):
        result = set_repository(clone, argument)
        assert result.returncode == 0
        assert len(result.stdout.splitlines()) == 15

    assert f'Repository = "{url}"' in (clone / "pyproject.toml").read_text("utf-8")
    assert url in (clone / "README.md").read_text("utf-8")
    for path in [*clone.glob("colab/*.ipynb"), *clone.glob("configs/*/*"), clone / "README.md"]:
        text = path.read_text("utf-8")
        assert "OWNER/NAME" not in text
        assert "/a/b" not in text
    for path in clone.glob("colab/*.ipynb"):
        install, *_ = sources(path)
        assert install == INSTALL.replace(REPOSITORY, url)
        first, *_ = sources(path, "markdown")
        assert first.count(f"/some-one/gpt.jax/blob/main/colab/{path.name}") == 2
    assert set_repository(clone, url + ".git").stdout == ""  # nothing changes


def test_the_repository_can_be_a_folder_that_badges_do_not_know(clone):
    result = set_repository(clone, "file:///tmp/gptjax.git/")

    assert result.returncode == 0
    for path in clone.glob("colab/*.ipynb"):
        assert 'REPOSITORY = "file:///tmp/gptjax"' in sources(path)[0]
        assert f"/{SLUG}/blob" in sources(path, "markdown")[0]


@pytest.mark.parametrize(
    "arguments", [(), ("a",), ("a/b/c",), ("http://x.y/a/b",), ('https://x/"a',), ("-h",)]
)
def test_anything_else_is_refused_and_changes_nothing(arguments, clone):
    assert set_repository(clone, *arguments).returncode == 1
    for path in clone.glob("colab/*.ipynb"):
        assert path.read_text("utf-8") == (FOLDER / path.name).read_text("utf-8")
