"""Installing gptjax where Colab's packages are leaves all of them as they are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.notebooks

ROOT = Path(__file__).resolve().parents[2]
COLAB = ROOT / "tests" / "colab.txt"


def installed(python):
    """The version of each package of an environment."""
    command = [python, "-m", "pip", "list", "--format=json"]
    rows = json.loads(subprocess.check_output(command))
    return {row["name"].lower(): row["version"] for row in rows}


def test_the_packages_of_colab_stay_what_they_are(tmp_path):
    environment = tmp_path / "environment"
    subprocess.check_call([sys.executable, "-m", "venv", environment])
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.check_call([*install, "-r", COLAB])
    before = installed(python)
    source = tmp_path / "source"  # without what building would leave in the clone
    names = ("gptjax", "configs", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)

    subprocess.check_call([*install, "."], cwd=source)

    after = installed(python)
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} <= {*before}
    assert {name: after[name] for name in before} == before
    assert "gptjax" in after.keys() - before.keys()
