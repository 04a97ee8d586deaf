"""Set-up shared by commands: compilation cache, --verbose, interruption."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.runtime.preemption import (
    EXIT_PREEMPTED,
    Interrupted,
    SignalMode,
    handle_signals,
    set_signal_mode,
)

LAST_STARTUP_PHASE = dict.fromkeys(["run_quickstart", "run_train"], "first step")
LAST_STARTUP_PHASE |= dict.fromkeys(["run_generate", "start_chat"], "first token")
PROCESS_START = time.perf_counter()  # close to the start of the process


def setup_session(args: argparse.Namespace, cache_dir: Path | None = None) -> None:
    """Enables the compilation cache and --verbose until the command ends.

    Args:
        args: of a command that runs a model.
        cache_dir: folder of the compilation cache; by default that of MODEL.
    """
    from gptjax.runtime.compilation_cache import cache_dir_for, persistent_cache
    from gptjax.runtime.timing import log_phases

    exit_stack, log = (
        args.until_end,
        log_to_stderr if args.verbose else lambda line: None,
    )
    if args.verbose:
        last_phase = LAST_STARTUP_PHASE.get(args.command.__name__, "answering")
        exit_stack.enter_context(log_phases(log_to_stderr, PROCESS_START, last_phase))
    exit_stack.enter_context(
        persistent_cache(cache_dir or cache_dir_for(args.model), log)
    )


def run_interruptible(run: Callable[[], Any], mode: SignalMode = "immediate") -> int:
    """Runs a function that SIGINT or SIGTERM may interrupt; returns the exit code.

    Args:
        run: sets another signal mode itself once there is progress to save.
        mode: signal mode until then; see `gptjax.runtime.preemption`.
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
