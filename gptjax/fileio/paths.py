"""Paths given by users, and the user's cache directory."""

import os
from pathlib import Path

from gptjax.errors import ConfigError, check_type


def user_path(path: str | Path) -> Path:
    """Path given by a user; `~` is expanded."""
    check_type("the path", path, str | os.PathLike, "Pass the path of a file or folder.")
    if not str(path):  # pathlib takes it as the current folder
        raise ConfigError("the path is empty. Pass the path of a file or folder.")
    if "\0" in str(path):
        raise ConfigError(f"the path {str(path)!r} contains a NUL character. Remove it.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"the home directory in {path} is unknown. Set HOME, or use a path without ~."
        ) from error


def user_cache_dir(kind: str) -> Path:
    """Cache directory of gptjax for "data" or "xla" (compiled programs)."""
    return user_path(os.environ.get("GPTJAX_HOME") or "~/.cache/gptjax") / kind
