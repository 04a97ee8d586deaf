"""The process of the `gptjax` command, also run by `python -m gptjax`."""

import atexit
import logging
import os
import signal
import sys
import threading
from typing import Any

from gptjax.runtime.preemption import exit_interrupted, set_stop_handler
from gptjax.runtime.terminal import discard, open_closed_streams, print_message


def main() -> int:
    """Runs the command of the process and returns its exit code.

    Signals are handled from here on, before the imports, to the end of the process.
    """
    set_stop_handler(exit_interrupted)
    # Errors in threads and callbacks of libraries also reach the command, or are
    # harmless, such as an interruption in a callback.
    sys.unraisablehook = lambda unraisable: None
    sys.excepthook = print_main_error
    open_closed_streams()
    from gptjax.cli.main import main
    from gptjax.cli.session import ConsoleHandler

    # To the end: threads of libraries also log when a command has failed.
    logging.getLogger().addHandler(ConsoleHandler(print_message, logging.WARNING))
    code = main()
    set_stop_handler(signal.SIG_IGN)  # all is done or saved, and Python is shutting down
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            discard(stream)
    if code:
        # After an exception, Python's teardown may crash or complain in libraries.
        atexit._run_exitfuncs()
        os._exit(code)
    return code


def print_main_error(kind: Any, error: Any, trace: Any) -> None:
    """Prints the traceback of an unexpected error, if it ends the command."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    sys.exit(main())
