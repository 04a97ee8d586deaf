"""Commands that install gptjax: from its clone or repository, never from an index."""

import tomllib
from importlib import metadata
from pathlib import Path

PROJECT_FILE = Path(__file__).parents[2] / "pyproject.toml"  # only in a clone


def repository_url() -> str:
    """Returns the URL of the repository, from [project.urls] in pyproject.toml."""
    if PROJECT_FILE.is_file():
        project = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8"))["project"]
        return project["urls"]["Repository"]
    urls = metadata.metadata("gptjax").get_all("Project-URL") or []
    return dict(url.split(", ", 1) for url in urls)["Repository"]


def install_command(extra: str) -> str:
    """Returns the command that installs an extra, from the clone if there is one."""
    if PROJECT_FILE.is_file():
        return f'pip install -e ".[{extra}]"'
    return f'pip install "gptjax[{extra}] @ git+{repository_url()}"'
