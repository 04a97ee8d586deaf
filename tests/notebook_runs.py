"""Executes a notebook as on a Colab runtime or as on another one."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# Variables of the tests of the library, which a notebook must not have.
OURS = (
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_NUM_CPU_DEVICES",
    "JAX_NUMPY_RANK_PROMOTION",
    "MPLBACKEND",
    "XLA_FLAGS",
)
COLAB = """\
import pathlib, sys, types

def note(path):
    with open("handed-over", "a") as file:
        file.write(str(pathlib.Path(path).stat().st_size))

colab = types.ModuleType("google.colab")
colab.files = types.SimpleNamespace(download=note)
colab.output = None  # jax imports it on Colab
sys.modules["google.colab"] = colab
"""


def set_environment(patch, cache):
    """Sets the environment of kernels that share compiled programs in `cache`."""
    for name in OURS:
        patch.delenv(name, raising=False)
    patch.setenv("GPTJAX_FAST", "1")
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def execute(path, folder, kernel):
    """Runs all cells in `folder`; returns the notebook with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, resources=place, kernel_name=kernel, timeout=900).execute()


def executed(path, folder, monkeypatch, colab=False):
    """The same, stored in $GPTJAX_EXECUTED or read from there if that is set."""
    kept = Path(os.environ.get("GPTJAX_EXECUTED", folder)) / path.name
    if not kept.exists():
        set_environment(monkeypatch, kept.parent / "xla")
        if colab:  # Python reads this file when it starts
            (folder / "start").mkdir()
            (folder / "start" / "sitecustomize.py").write_text(COLAB)
            monkeypatch.setenv("PYTHONPATH", str(folder / "start"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(execute(path, folder, "python3"), kept)
    return nbformat.read(kept, as_version=4)


def pictures(notebook):
    """The number of outputs that are pictures."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)
