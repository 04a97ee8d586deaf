"""What commands do around their work: keep programs, answer --verbose, stop."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.stopping import STOPPED, Mode, Stopped, answer, stop_signal

FIRST = dict.fromkeys(["quickstart", "train"], "first step")
FIRST |= dict.fromkeys(["generate", "chat"], "first token")
STARTED = time.perf_counter()  # as good as when the process was


def begin(args: argparse.Namespace, programs: Path | None = None) -> None:
    """Until the command ends: programs are kept, and --verbose is answered.

    Args:
        args: of a command that runs a model.
        programs: the folder for them; that of MODEL by default.
    """
    from gptjax.phases import told
    from gptjax.programs import folder_of, kept

    begun, say = args.until_end, remark if args.verbose else lambda line: None
    if args.verbose:
        last = FIRST.get(args.command.__name__, "answering")
        begun.enter_context(told(remark, STARTED, last))
    begun.enter_context(kept(programs or folder_of(args.model), say))


def stoppable(run: Callable[[], Any], mode: Mode = "leave") -> int:
    """Runs something that a signal may stop, at any moment; returns the exit code.

    Args:
        run: says itself when there is something to save.
        mode: how a signal is answered until then, see `gptjax.stopping`.
    """
    try:
        with stop_signal(final=True):
            answer(mode)
            run()
    except Stopped as stopped:
        print(f"{stopped}. The same command goes on from there.", flush=True)
        return STOPPED
    return 0


def remark(line: str) -> None:
    """What a person should know, apart from what was asked for."""
    print(line, file=sys.stderr)
