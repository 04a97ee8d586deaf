"""Commands that install gptjax never name it alone: that would ask a public index."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from gptjax.runtime import installation
from gptjax.runtime.installation import install_command, repository_url

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_a_clone_installs_itself_and_knows_its_repository():
    assert install_command("tpu-plan") == 'pip install -e ".[tpu-plan]"'
    assert repository_url() == PROJECT["urls"]["Repository"]


def test_an_installed_package_names_the_repository_that_it_was_built_with(tmp_path, monkeypatch):
    folder = tmp_path / "gptjax-1.dist-info"
    folder.mkdir()
    url = "https://github.com/someone/something"
    lines = ["Metadata-Version: 2.4", "Name: gptjax", f"Project-URL: Repository, {url}"]
    text = "\n".join([*lines, "Version: 1", ""])
    (folder / "METADATA").write_text(text)
    found = metadata.PathDistribution(folder).metadata
    monkeypatch.setattr(installation, "PROJECT_FILE", tmp_path / "pyproject.toml")
    monkeypatch.setattr(installation.metadata, "metadata", lambda name: found)

    assert install_command("tpu") == f'pip install "gptjax[tpu] @ git+{url}"'


# "gptjax" or "gptjax[extra]" as a requirement of pip, without an address behind it.
FROM_INDEX = re.compile(
    r"pip install [^\n&|;]*?(?<=[\s\"'])gptjax(\[[\w,-]+\])?(?! @ )(?=[\s\"'\\]|$)", re.M
)


def test_the_pattern_finds_what_it_should():
    for line in ("pip install gptjax", "pip install -q 'gptjax[tpu]'"):
        assert FROM_INDEX.search(line)
    for line in ('pip install "gptjax[tpu] @ git+https://x.y/z"', "pip install -e ."):
        assert not FROM_INDEX.search(line)


@pytest.mark.parametrize("folder", ["gptjax", "configs", "colab", "README.md"])
def test_nothing_installs_a_package_of_this_name_from_an_index(folder):
    root = ROOT / folder
    files = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]

    for path in files:
        found = FROM_INDEX.search(path.read_text("utf-8", errors="replace"))
        assert not found, (path, found)
