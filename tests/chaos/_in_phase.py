"""Runs `gptjax` and sends itself SIGTERM in a phase of the run.

    python -m tests.chaos._in_phase MODULE FUNCTION CALL DELAY train ...

The signal comes DELAY seconds after that call of the function has begun; a file
`signalled` then says so by the time at which it was made. CALL 0 sends none.
"""

import functools
import importlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def disturb(module: str, name: str, call: int, delay: float) -> None:
    """Arranges for the signal."""
    place = importlib.import_module(module)
    function, calls = getattr(place, name), []

    def send() -> None:
        Path("signalled").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    @functools.wraps(function)
    def watched(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == call:
            timer = threading.Timer(delay, send)
            timer.daemon = True
            timer.start()
        return function(*args, **options)

    setattr(place, name, watched)


if __name__ == "__main__":
    if int(sys.argv[3]):
        disturb(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    from gptjax.cli import main

    sys.exit(main.main(sys.argv[5:]))
