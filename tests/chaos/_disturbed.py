"""Runs `gptjax`, with a pause in a function of it, or with SIGTERM during a call of it.

    python -m tests.chaos._disturbed MODULE FUNCTION CALL SECONDS train ...

The signal comes SECONDS after that call of the function has begun. CALL 0 pauses for so
long before each call instead.
"""

import functools
import importlib
import os
import signal
import sys
import threading
import time
from typing import Any


def disturb(module: str, name: str, call: int, seconds: float) -> None:
    """Replaces the function by one that pauses, or starts the timer of the signal."""
    place = importlib.import_module(module)
    function, calls = getattr(place, name), []

    @functools.wraps(function)
    def disturbed(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if not call:
            time.sleep(seconds)
        if len(calls) == call:
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()
        return function(*args, **options)

    setattr(place, name, disturbed)


if __name__ == "__main__":
    disturb(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    from gptjax.cli import main

    sys.exit(main.main(sys.argv[5:]))
