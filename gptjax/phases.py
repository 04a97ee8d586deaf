"""Where the seconds between a command and its first result go.

The library only notes that a phase has ended, through Python's logging; nothing is
said or measured unless the command line listens (`--verbose`).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

LOG = logging.getLogger("gptjax.phases")
LOG.setLevel(logging.WARNING)  # whatever the program around us listens to
LOG.propagate = False  # its lines are for `Teller` alone
COMPILED = "/jax/core/compile/backend_compile_duration"  # reading it back included
READ_BACK = "/jax/compilation_cache/cache_retrieval_time_sec"


def reached(phase: str, value: Any = None) -> None:
    """Notes that a phase has ended; if anyone listens, once `value` is computed."""
    if LOG.isEnabledFor(logging.INFO):
        if value is not None:
            import jax

            jax.block_until_ready(value)
        LOG.info(phase)


@contextlib.contextmanager
def hearing(listener: Callable[[str, float], None]) -> Iterator[None]:
    """JAX tells the listener (event, seconds, ...) of what it does in the block."""
    import jax.monitoring

    open_ = [True]

    def heard(event: str, duration_secs: float, **about: Any) -> None:
        if open_:
            listener(event, duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield
    finally:
        open_.clear()  # JAX 0.7 cannot forget a listener


class Teller(logging.Handler):
    """Says each phase with its seconds, to the first result; compiling is one more."""

    def __init__(
        self,
        say: Callable[[str], None],
        started: float,
        last: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`started` is when the first phase began, by the clock; see `told`."""
        super().__init__()
        self.last = last
        self.say, self.clock, self.started, self.before = say, clock, started, started
        self.seconds = self.apart = 0.0  # of compiling: in all, and in this phase
        self.programs = self.read_back = 0
        self.told: set[str] = set()

    def heard(self, event: str, seconds: float) -> None:
        """Adds up what JAX says of its compiler."""
        if event == COMPILED:
            self.programs += 1
            self.seconds += seconds
            self.apart += seconds
        self.read_back += event == READ_BACK

    def emit(self, record: logging.LogRecord) -> None:
        """A phase has ended."""
        phase, now = record.getMessage(), self.clock()
        if phase in self.told:
            return
        self.told.add(phase)
        if phase == self.last:
            which = f"{self.programs} programs, {self.read_back} of them from a file"
            self.say(f"{'compiling':<12}{self.seconds:8.2f} s  {which}")
        self.say(f"{phase:<12}{now - self.before - self.apart:8.2f} s")
        if phase == self.last:
            self.say(f"{'in all':<12}{now - self.started:8.2f} s")
            LOG.setLevel(logging.WARNING)  # from here on nothing waits to be measured
        self.before, self.apart = now, 0.0


@contextlib.contextmanager
def told(say: Callable[[str], None], started: float, last: str) -> Iterator[None]:
    """Says a line for each phase that ends in the block, from `started` on.

    Args:
        say: gets each line.
        started: of `time.perf_counter()`.
        last: the phase that ends with the first result, at the end of the block if
            not before.
    """
    teller = Teller(say, started, last)
    LOG.addHandler(teller)
    LOG.setLevel(logging.INFO)
    try:
        with hearing(teller.heard):
            yield
            reached(last)
    finally:
        LOG.removeHandler(teller)
        LOG.setLevel(logging.WARNING)
