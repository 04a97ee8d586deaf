"""Stopping on request, and timing what is not stopped."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(Exception):  # noqa: N818 (it is no error)
    """A signal asked the run to stop; everything is saved."""


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that is true once SIGINT or SIGTERM came.

    The second signal ends the process at once, as if there were no handler.
    """
    came: list[int] = []
    before = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Seconds from lap to lap, less those spent aside: the one object with a memory."""

    def __init__(self) -> None:
        self.started, self.spent = time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds since the last lap that were not spent aside."""
        now = time.perf_counter()
        seconds = now - self.started - self.spent
        self.started, self.spent = now, 0.0
        return seconds

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time in here is not training time."""
        started = time.perf_counter()
        yield
        self.spent += time.perf_counter() - started
