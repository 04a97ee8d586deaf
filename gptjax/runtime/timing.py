"""Timing: startup phases of a command, and training steps.

Startup phases lie between a command and its first result. The library marks the end of
each phase through Python's logging; nothing is measured or printed unless the command
line enables it (`--verbose`). `StepTimer` measures the steps of a training run.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

phase_logger = logging.getLogger("gptjax.runtime.timing")
phase_logger.setLevel(logging.WARNING)  # whatever level the application sets
phase_logger.propagate = False  # records are for `PhaseLogger` only
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # includes cache reads
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"


def mark_phase(phase: str, value: Any = None) -> None:
    """Marks the end of a phase; if enabled, waits until `value` is computed."""
    if phase_logger.isEnabledFor(logging.INFO):
        if value is not None:
            import jax

            jax.block_until_ready(value)
        phase_logger.info(phase)


@contextlib.contextmanager
def listen_to_jax_events(listener: Callable[[str, float], None]) -> Iterator[None]:
    """Passes JAX duration events (event, seconds) to the listener inside the block."""
    import jax.monitoring

    active = [True]

    def forward(event: str, duration_secs: float, **metadata: Any) -> None:
        if active:
            listener(event, duration_secs)

    jax.monitoring.register_event_duration_secs_listener(forward)
    try:
        yield
    finally:
        active.clear()  # JAX 0.7 cannot unregister a listener


class PhaseLogger(logging.Handler):
    """Logs the seconds of each phase, with compilation as a phase of its own."""

    def __init__(
        self,
        log: Callable[[str], None],
        started: float,
        final_phase: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`started` is the clock time when the first phase began; see `log_phases`."""
        super().__init__()
        self.final_phase = final_phase
        self.log = log
        self.clock = clock
        self.started = started
        self.phase_started = started
        # of compilation: in total, and in this phase
        self.compile_seconds = self.phase_compile_seconds = 0.0
        self.num_programs = self.num_cache_hits = 0
        self.logged_phases: set[str] = set()

    def on_jax_event(self, event: str, seconds: float) -> None:
        """Counts compilations, their time and cache hits."""
        if event == COMPILE_EVENT:
            self.num_programs += 1
            self.compile_seconds += seconds
            self.phase_compile_seconds += seconds
        self.num_cache_hits += event == CACHE_HIT_EVENT

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a phase at its end."""
        phase, now = record.getMessage(), self.clock()
        if phase in self.logged_phases:
            return
        self.logged_phases.add(phase)
        if phase == self.final_phase:
            detail = f"{self.num_programs} programs, {self.num_cache_hits} from the cache"
            self.log(f"{'compiling':<12}{self.compile_seconds:8.2f} s  {detail}")
        self.log(f"{phase:<12}{now - self.phase_started - self.phase_compile_seconds:8.2f} s")
        if phase == self.final_phase:
            self.log(f"{'total':<12}{now - self.started:8.2f} s")
            phase_logger.setLevel(logging.WARNING)  # stops measuring
        self.phase_started, self.phase_compile_seconds = now, 0.0


@contextlib.contextmanager
def log_phases(log: Callable[[str], None], started: float, final_phase: str) -> Iterator[None]:
    """Logs the time of each phase that ends inside the block.

    The first phase began at `started`, in the time of `time.perf_counter()`. The final
    phase ends with the first result, at the latest with the block.
    """
    handler = PhaseLogger(log, started, final_phase)
    phase_logger.addHandler(handler)
    phase_logger.setLevel(logging.INFO)
    try:
        with listen_to_jax_events(handler.on_jax_event):
            yield
            mark_phase(final_phase)
    finally:
        phase_logger.removeHandler(handler)
        phase_logger.setLevel(logging.WARNING)


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

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        started = self.clock()
        try:
            yield
        finally:
            self.waited += self.clock() - started

    @contextlib.contextmanager
    def exclude(self) -> Iterator[None]:
        """Excludes the time of the block, for example of an evaluation."""
        step_started = self.clock()
        yield
        self.excluded_seconds += self.clock() - step_started
