"""Commands that install gptjax name its clone or repository, never an index."""

import re
from email.message import Message
from pathlib import Path

from gptjax import errors
from gptjax.errors import install_command

ROOT = Path(__file__).resolve().parents[1]
# "gptjax" or "gptjax[extra]" as a requirement of pip, without an address behind it.
FROM_INDEX = re.compile(
    r"pip install [^\n&|;]*?(?<=[\s\"'])gptjax(\[[\w,-]+\])?(?! @ )(?=[\s\"'\\]|$)", re.M
)


def test_a_clone_installs_itself_and_a_wheel_installs_from_its_repository(tmp_path, monkeypatch):
    assert install_command("tpu-plan") == 'pip install -e ".[tpu-plan]"'
    address = "https://github.com/someone/something"
    found = Message()
    found["Project-URL"] = f"Repository, {address}"
    monkeypatch.setattr(errors, "PROJECT_FILE", tmp_path / "pyproject.toml")
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: found)
    assert install_command("tpu") == f'pip install "gptjax[tpu] @ git+{address}"'


def test_no_file_installs_a_package_of_this_name_from_an_index():
    assert FROM_INDEX.search("pip install -q 'gptjax[tpu]'")
    folders = [ROOT / name for name in ("gptjax", "configs", "colab")]
    for path in [ROOT / "README.md", *(p for f in folders for p in f.rglob("*") if p.is_file())]:
        found = FROM_INDEX.search(path.read_text("utf-8", errors="replace"))
        assert not found, (path, found)
