"""Command that installs an extra: from the clone or repository, never from an index."""

from importlib import metadata
from pathlib import Path

PROJECT_FILE = Path(__file__).parents[2] / "pyproject.toml"  # only in a clone


def install_command(extra: str) -> str:
    """Returns the command that installs an extra, from the clone if there is one."""
    if PROJECT_FILE.is_file():
        return f'pip install -e ".[{extra}]"'
    urls = metadata.metadata("gptjax").get_all("Project-URL") or []  # "name, url"
    url = dict(url.split(", ", 1) for url in urls)["Repository"]
    return f'pip install "gptjax[{extra}] @ git+{url}"'
