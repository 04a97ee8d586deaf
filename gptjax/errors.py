"""Errors a user can fix: a message states the value, the requirement and the fix.

The command line prints them without a traceback and exits with their `exit_code`.
"""

import errno
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

PROJECT_FILE = Path(__file__).parents[1] / "pyproject.toml"  # only in a clone
MAX_MESSAGE_CHARS = 1000  # longer ones quote foreign text
NUM_KEPT_CHARS = 200  # at the start and at the end of such a message, or of a line


class GptjaxError(Exception):
    """Base of all errors a user can fix."""

    exit_code = 2  # of the command

    def __str__(self) -> str:
        """Returns the message; omits the middle of a long one."""
        text = super().__str__()
        if len(text) <= MAX_MESSAGE_CHARS:
            return text
        return f"{text[:NUM_KEPT_CHARS]} [...] {text[-NUM_KEPT_CHARS:]}"


class ConfigError(GptjaxError, ValueError):
    """Invalid configuration."""


class DataError(GptjaxError, ValueError):
    """Invalid data."""


class ModelError(GptjaxError, ValueError):
    """Invalid or incompatible model, checkpoint or run folder."""


class ResourceError(GptjaxError, OSError):
    """Out of memory, disk or network: the same command may succeed later."""

    exit_code = 1


class DivergenceError(GptjaxError, ArithmeticError):
    """The loss of a training run became non-finite."""

    exit_code = 1


# How to raise a limit of the machine or process, by error number.
LIMIT_ADVICE = {
    errno.ENOSPC: "Free space on the disk",
    errno.EDQUOT: "Free space within your quota",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "Raise the limit of open files (such as ulimit -n 1024)",
    errno.ENFILE: "Close other programs",
    errno.ENOMEM: "Free memory, or raise its limit (ulimit -v)",
}
OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|can't start new thread")  # of XLA, of Python


def to_resource_error(error: BaseException, memory_advice: str = "") -> ResourceError | None:
    """Returns an error that names the exhausted limit; None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ResourceError):
        number, detail = getattr(cause, "errno", None), getattr(cause, "filename", None)
        is_out_of_memory = isinstance(cause, RuntimeError) and OUT_OF_MEMORY.search(str(cause))
        if isinstance(cause, MemoryError) or is_out_of_memory:
            number, detail = errno.ENOMEM, str(cause).partition("\n")[0][:200].rstrip(".")
        if number in LIMIT_ADVICE:
            context, found, _ = str(error).partition(str(cause) or "\0")
            context = context if found else ""
            reason = ": ".join(map(str, filter(None, [os.strerror(number), detail])))
            fix = memory_advice if number == errno.ENOMEM else ""
            fix = fix or f"{LIMIT_ADVICE[number]}."
            return ResourceError(f"{context}{reason}. {fix} Then run the same command again.")
        cause = cause.__cause__
    return None


def to_os_error(error: Exception, path: Path) -> OSError:
    """Error with the number in a message of TensorStore or of safetensors, if any."""
    match = re.search(r"(?:os_error_code='?|os error )(\d+)", str(error))
    text = short_message(error)
    return OSError(int(match[1]), text, str(path)) if match else OSError(text)


def short_message(error: BaseException) -> str:
    """First line of an error message, shortened, or the name of the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:NUM_KEPT_CHARS]


def check_type(name: str, value: Any, expected: Any, fix: str) -> None:
    """Raises ConfigError unless the argument `name` has the expected type."""
    if not isinstance(value, expected):
        shown = repr(value)[:60] if isinstance(value, str | int | float | None) else ""
        raise ConfigError(
            f"{name}{'=' * bool(shown)}{shown} is of type {type(value).__name__}, not "
            f"{getattr(expected, '__name__', expected)}. {fix}"
        )


def is_installed(package: str) -> bool:
    """True if a package can be imported; a folder of its name is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def install_command(extra: str) -> str:
    """Returns the command that installs an extra: from the clone or the repository."""
    if PROJECT_FILE.is_file():
        return f'pip install -e ".[{extra}]"'
    from importlib import metadata  # slow

    urls = metadata.metadata("gptjax").get_all("Project-URL") or []  # "name, url"
    url = dict(url.split(", ", 1) for url in urls)["Repository"]
    return f'pip install "gptjax[{extra}] @ git+{url}"'
