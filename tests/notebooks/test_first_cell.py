"""The first cell of a notebook installs gptjax and leaves other packages as they are.

Each test makes an environment with the versions of this one: in CI those of Colab.
Notebook 03 runs in every check; all of them with

    pytest -n0 -m "notebooks and slow" tests/notebooks/test_first_cell.py
"""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from tests.notebook_runs import execute, pictures, set_environment
from tests.notebooks.test_notebooks import NOTEBOOKS, ROOT

PATHS = [
    pytest.param(path, id=path.stem, marks=[] if "03" in path.stem else pytest.mark.slow)
    for path in NOTEBOOKS
]


def installed(python):
    """The version of each package of an environment."""
    rows = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format=json"]))
    return {row["name"].lower(): row["version"] for row in rows}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with the files of this one, changes included, that knows its URL."""
    folder = tmp_path_factory.mktemp("repository") / "gptjax"
    list_files = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.check_output(list_files, cwd=ROOT, text=True).splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    script = folder / "colab" / "set_repository.py"
    subprocess.check_call([sys.executable, script, folder.as_uri()])
    commit = "git init -q && git add . && git -c user.name=a -c user.email=a@b.c commit -q -m All"
    subprocess.check_call(["bash", "-c", commit], cwd=folder)
    return folder


@pytest.fixture(scope="module", params=["a clone", "an empty folder"])
def place(request, clone, tmp_path_factory):
    """A folder, and the name of a kernel without gptjax that is started there."""
    base = tmp_path_factory.mktemp("environment")
    subprocess.check_call([sys.executable, "-m", "venv", base])
    python = base / "bin" / "python"
    colab = re.findall(r"^([\w-]+)==", (ROOT / "tests" / "colab.txt").read_text("utf-8"), re.M)
    packages = [f"{name}=={metadata.version(name)}" for name in colab]
    subprocess.check_call([python, "-m", "pip", "install", "-q", "ipykernel", *packages])
    kernel = ["ipykernel", "install", "--prefix", base, "--name", "bare"]
    subprocess.check_call([python, "-m", *kernel])
    before = installed(python)
    folder = clone / "colab"
    if request.param == "an empty folder":
        folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, clone.parent / "xla")
        patch.setenv("JUPYTER_PATH", str(base / "share" / "jupyter"))
        yield folder
    after = installed(python)
    assert {name: after[name] for name in before} == before  # pip itself included
    assert "gptjax" in after.keys() - before.keys()


@pytest.mark.notebooks
@pytest.mark.parametrize("path", PATHS)
def test_a_notebook_installs_gptjax_and_runs(path, clone, place, request):
    if path.stem[:2] in ("01", "04", "06", "07", "10"):
        request.getfixturevalue("shared_data")

    assert pictures(execute(clone / "colab" / path.name, place, "bare")) >= 1
