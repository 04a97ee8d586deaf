"""The process of the `gptjax` command, also run by `python -m gptjax`."""

import atexit
import os
import signal
import sys

from gptjax.runtime.preemption import EXIT_PREEMPTED, STOP_SIGNALS, exit_interrupted
from gptjax.runtime.terminal import discard, open_closed_descriptors


def main() -> int:
    """Runs the command of the process and returns its exit code.

    Signals are handled from here on, before the imports, to the end of the process.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, exit_interrupted)
    open_closed_descriptors()
    from gptjax.cli.main import main

    code = main()
    for number in STOP_SIGNALS:  # all is done or saved, and Python is shutting down
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            discard(stream)
    if code == EXIT_PREEMPTED:
        # Python's teardown crashes in C++ code that the exception has interrupted.
        atexit._run_exitfuncs()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
