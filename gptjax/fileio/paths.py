"""Paths given by users, and the user's cache directory."""

import os
from pathlib import Path

from gptjax.errors import ConfigError, check_type

MAX_NAME_BYTES = 255  # of a file or folder, on all common file systems
MAX_PATH_BYTES = 4095  # PATH_MAX of Linux, without its NUL


def user_path(path: str | Path) -> Path:
    """Path given by a user; `~` is expanded."""
    check_type("the path", path, str | os.PathLike, "Pass the path of a file or folder.")
    if not str(path):  # pathlib takes it as the current folder
        raise ConfigError("the path is empty. Pass the path of a file or folder.")
    if "\0" in str(path):
        raise ConfigError(f"the path {str(path)!r} contains a NUL character. Remove it.")
    data = str(path).encode("utf-8", "surrogatepass")
    if len(data) > MAX_PATH_BYTES or max(map(len, data.split(b"/"))) > MAX_NAME_BYTES:
        raise ConfigError(f"the path {str(path)!r} is too long. Use shorter names.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"the home directory in {path} is unknown. Set HOME, or use a path without ~."
        ) from error


def require_new_file(out: Path | None) -> None:
    """Raises ConfigError if the file of --out exists."""
    if out is not None and out.exists():
        raise ConfigError(f"{out} already exists. Name another file with --out.")


def user_cache_dir(kind: str) -> Path:
    """Cache directory of gptjax for "data" or "xla" (compiled programs)."""
    return user_path(os.environ.get("GPTJAX_HOME") or "~/.cache/gptjax") / kind
