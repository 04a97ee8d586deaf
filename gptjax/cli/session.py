"""Set-up shared by commands: messages, compilation cache, --verbose, interruption."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from gptjax.runtime.preemption import (
    EXIT_PREEMPTED,
    Interrupted,
    SignalMode,
    handle_signals,
    set_signal_mode,
)

PROCESS_START = time.perf_counter()  # close to the start of the process


class StdoutHandler(logging.Handler):
    """Prints log messages to stdout and flushes, into a file as on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message; a closed pipe raises `BrokenPipeError`."""
        print(self.format(record), flush=True)


@contextlib.contextmanager
def log_to_stdout() -> Iterator[None]:
    """Prints the progress messages of the library (logger "gptjax", INFO) meanwhile."""
    logger, handler = logging.getLogger("gptjax"), StdoutHandler()
    if any(isinstance(other, StdoutHandler) for other in logger.handlers):
        yield  # in a notebook
        return
    previous = (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl and Colab have handlers at the root logger
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = previous


def setup_session(verbose: bool, last_phase: str = "answering") -> None:
    """Enables the compilation cache and --verbose until the command ends.

    The startup phase `last_phase` ends with the first result.
    """
    from gptjax.runtime.compilation_cache import persistent_cache
    from gptjax.runtime.timing import log_phases

    context = click.get_current_context()
    if verbose:
        context.with_resource(log_phases(log_to_stderr, PROCESS_START, last_phase))
    context.with_resource(persistent_cache())


def load_model(name: str, *, int8: bool, verbose: bool, last_phase: str = "answering") -> Any:
    """Sets up the session and loads MODEL."""
    from gptjax.runtime.timing import mark_phase

    setup_session(verbose, last_phase)
    from gptjax.weights.load import load

    mark_phase("importing")
    model = load(name, log_to_stderr, int8=int8)
    mark_phase("loading")
    return model


def run_interruptible(run: Callable[[], Any], mode: SignalMode = "immediate") -> int:
    """Runs a function that SIGINT or SIGTERM may interrupt; returns the exit code.

    The function sets another signal mode itself once there is progress to save.
    """
    try:
        with handle_signals(final=True):
            set_signal_mode(mode)
            run()
    except Interrupted as stopped:
        print(f"{stopped}. The same command resumes from there.", flush=True)
        return EXIT_PREEMPTED
    return 0


def log_to_stderr(line: str) -> None:
    """Logs a line to stderr, apart from the command's output."""
    print(line, file=sys.stderr)
