"""Set-up shared by commands: progress messages, compilation cache, --verbose."""

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from gptjax.errors import ResourceError
from gptjax.runtime.terminal import logger, print_message, print_progress

MIN_ADDRESS_SPACE = 1 << 31  # bytes; a tiny model needs 1.9e9
PROCESS_START = time.perf_counter()  # close to the start of the process


class ConsoleHandler(logging.Handler):
    """Prints the messages of gptjax, and no log of other packages."""

    def __init__(self, print_line: Callable[[str], None], level: int = logging.INFO) -> None:
        """Takes the function that prints a message, and the lowest level."""
        super().__init__(level)
        self.print_line = print_line

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message."""
        if record.name.startswith("gptjax"):
            self.print_line(self.format(record))


@contextlib.contextmanager
def log_to_console(print_line: Callable[[str], None] = print_progress) -> Iterator[None]:
    """Prints progress and warnings of the library (logger "gptjax") meanwhile."""
    handler = ConsoleHandler(print_line)
    if any(isinstance(other, ConsoleHandler) for other in logger.handlers):
        yield  # in a notebook
        return
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl and Colab have handlers at the root logger
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def setup_session(verbose: bool, last_phase: str = "answering") -> None:
    """Enables the compilation cache and --verbose until the command ends.

    The startup phase `last_phase` ends with the first result.
    """
    from gptjax.runtime.compilation_cache import persistent_cache
    from gptjax.runtime.timing import log_phases

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < MIN_ADDRESS_SPACE:
        raise ResourceError(
            f"{limit >> 10} KiB of address space are too few for JAX, which would crash. Raise "
            f"the limit to at least {MIN_ADDRESS_SPACE >> 10} (ulimit -v)."
        )
    context = click.get_current_context()
    if verbose:
        context.with_resource(log_phases(print_message, PROCESS_START, last_phase))
    context.with_resource(persistent_cache())


def load_model(name: str, *, int8: bool, verbose: bool, last_phase: str = "answering") -> Any:
    """Sets up the session and loads MODEL."""
    from gptjax.runtime.timing import mark_phase

    setup_session(verbose, last_phase)
    click.get_current_context().with_resource(log_to_console(print_message))
    from gptjax.weights.load import load

    mark_phase("importing")
    model = load(name, int8=int8)
    mark_phase("loading")
    return model
