"""Runs `gptjax`, with a pause in a function of it, or with SIGTERM during a call of it.

    python -m tests.chaos._disturbed MODULE FUNCTION CALL SECONDS train ...

The signal comes SECONDS after that call of the function has begun. CALL 0 pauses for so
long before each call instead.
"""

import functools
import importlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def ignore(*_: Any, **__: Any) -> None:
    pass


def watch(owner: Any, name: str, before: Callable[..., Any], after: Any = ignore) -> None:
    """Calls `before` and `after` with the arguments of each call of a function."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*args: Any, **options: Any) -> Any:
        before(*args, **options)
        result = function(*args, **options)
        after(*args, **options)
        return result

    setattr(owner, name, watched)


def killer(point: int, points: Iterator[int]) -> Callable[..., None]:
    """Returns a function that kills this process when its turn is `point`."""

    def pass_point(*_: Any, **__: Any) -> None:
        if next(points) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return pass_point


if __name__ == "__main__":
    module, name, call, seconds = sys.argv[1:5]
    calls = itertools.count(1)

    def disturb(*_: Any, **__: Any) -> None:
        if call == "0":
            time.sleep(float(seconds))
        elif next(calls) == int(call):
            timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()

    watch(importlib.import_module(module), name, disturb)
    from gptjax import __main__

    sys.argv[1:] = sys.argv[5:]
    sys.exit(__main__.main())
