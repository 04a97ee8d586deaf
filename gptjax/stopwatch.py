"""Timing what is training, and not what is done aside."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Stopwatch:
    """Seconds from lap to lap, less those spent aside: the one object with a memory."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.started = clock, clock()
        self.spent = self.waited = 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap that were not spent aside; those of waiting."""
        now, waited = self.clock(), self.waited
        seconds = now - self.started - self.spent
        self.started, self.spent, self.waited = now, 0.0, 0.0
        return seconds, waited

    def waiting(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items; the time until each is there counts as waiting."""
        source, end = iter(items), object()
        while True:
            started = self.clock()
            item = next(source, end)
            self.waited += self.clock() - started
            if item is end:
                return
            yield item

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time in here is not training time."""
        started = self.clock()
        yield
        self.spent += self.clock() - started
