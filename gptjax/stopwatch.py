"""Step timing."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class StepTimer:
    """Step timer excluding evaluation time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.started = clock, clock()
        self.excluded_seconds = self.waited = 0.0

    def end_step(self) -> tuple[float, float]:
        """Ends a step; returns its seconds and those spent waiting for data."""
        now, data_seconds = self.clock(), self.waited
        seconds = now - self.started - self.excluded_seconds
        self.started, self.excluded_seconds, self.waited = now, 0.0, 0.0
        return seconds, data_seconds

    def time_data(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items; the time to get each counts as waiting for data."""
        source, end = iter(items), object()
        while True:
            started = self.clock()
            item = next(source, end)
            self.waited += self.clock() - started
            if item is end:
                return
            yield item

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time of the block, for example of an evaluation."""
        step_started = self.clock()
        yield
        self.excluded_seconds += self.clock() - step_started
