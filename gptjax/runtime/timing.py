"""Timing: startup phases of a command (`--verbose`), steps of a run, long loops."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gptjax.runtime.terminal import logger

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # includes cache reads
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"
FIRST_PROGRESS_SECONDS = 3.0  # until the first progress line of a long loop

Item = TypeVar("Item")

_phase_timers: list["PhaseTimer"] = []  # at most one; filled by `log_phases`


def mark_phase(phase: str, value: Any = None) -> None:
    """Marks the end of a phase; if it is timed, waits until `value` is computed."""
    for timer in _phase_timers:
        if value is not None and not timer.is_finished:
            import jax

            jax.block_until_ready(value)
        timer.end_phase(phase)


class PhaseTimer:
    """Logs the seconds of each phase, with compilation as a phase of its own."""

    def __init__(self, log: Callable[[str], None], started: float, final_phase: str) -> None:
        self.log, self.final_phase, self.is_finished = log, final_phase, False
        self.started = self.phase_started = started
        self.compile_seconds: list[float] = []  # of each program
        self.phase_compile_seconds, self.num_cache_hits = 0.0, 0

    def on_jax_event(self, event: str, duration_secs: float, **metadata: Any) -> None:
        """Counts compilations, their time and cache hits."""
        if event == COMPILE_EVENT:
            self.compile_seconds.append(duration_secs)
            self.phase_compile_seconds += duration_secs
        self.num_cache_hits += event == CACHE_HIT_EVENT

    def end_phase(self, phase: str) -> None:
        """Logs a phase at its end; the final one includes the total."""
        if self.is_finished:
            return
        now, self.is_finished = time.perf_counter(), phase == self.final_phase
        if self.is_finished:
            detail = f"{len(self.compile_seconds)} programs, {self.num_cache_hits} from the cache"
            self.log(f"{'compiling':<12}{sum(self.compile_seconds):8.2f} s  {detail}")
        self.log(f"{phase:<12}{now - self.phase_started - self.phase_compile_seconds:8.2f} s")
        if self.is_finished:
            self.log(f"{'total':<12}{now - self.started:8.2f} s")
        self.phase_started, self.phase_compile_seconds = now, 0.0


@contextlib.contextmanager
def log_phases(log: Callable[[str], None], started: float, final_phase: str) -> Iterator[None]:
    """Logs the time of each phase that ends inside the block.

    The first phase began at `started`, in the time of `time.perf_counter()`. The final
    phase ends with the first result, at the latest with the block.
    """
    import jax.monitoring

    timer = PhaseTimer(log, started, final_phase)
    # JAX 0.7 cannot unregister a listener; it is of no effect after the block.
    jax.monitoring.register_event_duration_secs_listener(timer.on_jax_event)
    _phase_timers.append(timer)
    try:
        yield
        mark_phase(final_phase)
    finally:
        _phase_timers.remove(timer)


class StepTimer:
    """Step timer excluding the time of compilation and evaluation."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.excluded_seconds = self.waited = 0.0

    def end_step(self) -> tuple[float, float]:
        """Ends a step; returns its seconds and those spent waiting for data."""
        now, data_seconds = time.perf_counter(), self.waited
        seconds = now - self.started - self.excluded_seconds
        self.started, self.excluded_seconds, self.waited = now, 0.0, 0.0
        return seconds, data_seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextlib.contextmanager
    def exclude(self) -> Iterator[None]:
        """Excludes the time of the block, for example of an evaluation."""
        started = time.perf_counter()
        yield
        self.excluded_seconds += time.perf_counter() - started


def log_progress(
    items: Iterable[Item], total: int | None, action: str, unit: str
) -> Iterator[Item]:
    """Yields the items; logs the progress of a long loop, and how long it will take.

    The first line comes after `FIRST_PROGRESS_SECONDS`, each next one after twice the
    time. `total` is None if it is unknown. `action` and `unit` are words, such as
    "encoding" and "texts".
    """
    started, next_line = time.perf_counter(), FIRST_PROGRESS_SECONDS
    for done, item in enumerate(items):
        seconds = time.perf_counter() - started
        if done and seconds > next_line:
            text = f"{action:<8} {done:,} {unit}"
            if total is not None:
                left = format_duration(seconds / done * (total - done))
                text = f"{action:<8} {done:,} of {total:,} {unit}, about {left} left"
            logger.info(text)
            next_line = 2 * seconds
        yield item


def format_duration(seconds: int | float) -> str:
    """Duration in hours, minutes and seconds.

    >>> format_duration(8040), format_duration(75), format_duration(3.2)
    ('2h14m', '1m15s', '3s')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
