"""Graceful preemption (SIGINT/SIGTERM) and heartbeat.

The effect of a signal depends on the mode:

    "immediate"   no unsaved progress: raises `Interrupted` at once
    "deferred"    recorded; the loops poll for it, save, and raise `Interrupted`
    "collective"  recorded; all processes of a run agree on the step to stop at
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

SignalMode = Literal["immediate", "deferred", "collective"]
EXIT_PREEMPTED = 75  # exit code; EX_TEMPFAIL of sysexits.h: retry
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTHING_TO_SAVE = "interrupted; no unsaved progress"
SIGNAL_GRACE_SECONDS = 1.0  # for Python to handle a signal, e.g. while compiling
HEARTBEAT_ENV = "GPTJAX_ALIVE"  # environment variable: path of the heartbeat file
HEARTBEAT_INTERVAL_SECONDS = 0.5  # minimum time between heartbeats
HANG_STEPS = 20  # hang timeout, as a multiple of the step time
LONG_OPERATION_SECONDS = 1800.0  # hang timeout during operations without heartbeats


class Interrupted(BaseException):
    """The run was interrupted by a signal; all progress is saved.

    Not an `Exception`, so that no handler swallows it.
    """


class SignalState:
    """Received signals and the mode for the next one."""

    def __init__(self) -> None:
        """Starts with no signal received."""
        self.received: list[int] = []
        self.mode: SignalMode = "deferred"


# At most one: signal handlers are per process.
_active_signal_states: list[SignalState] = []


@contextlib.contextmanager
def handle_signals(final: bool = False) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once SIGINT or SIGTERM was received.

    The second signal ends the process at once, as without a handler. A nested block
    changes nothing.

    Args:
        final: the process exits after this block. Signals are then handled even while
            Python is blocked, for example by compilation.
    """
    if _active_signal_states or threading.current_thread() is not threading.main_thread():
        yield lambda: bool(_active_signal_states and _active_signal_states[0].received)
        return
    state = SignalState()
    previous_handlers = {n: signal.getsignal(n) for n in STOP_SIGNALS}

    def on_signal(number: int, _: Any) -> None:
        state.received.append(number)
        for stop_signal in STOP_SIGNALS:
            handler = signal.SIG_DFL if final else previous_handlers[stop_signal]
            signal.signal(stop_signal, handler)
        if state.mode == "immediate":
            raise Interrupted(NOTHING_TO_SAVE)

    _active_signal_states.append(state)
    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)
    try:
        with _install_wakeup_fd(state) if final else contextlib.nullcontext():
            yield lambda: bool(state.received)
    except Exception as error:
        if state.received and state.mode == "immediate":  # Orbax wraps any exception
            raise Interrupted(NOTHING_TO_SAVE) from error
        raise
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        _active_signal_states.clear()


@contextlib.contextmanager
def _install_wakeup_fd(state: SignalState) -> Iterator[None]:
    """Handles signals in a thread while the main thread is blocked."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    thread = threading.Thread(target=_poll_wakeup_fd, args=(read_fd, state), daemon=True)
    previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        os.close(write_fd)
        thread.join()
        os.close(read_fd)


def _poll_wakeup_fd(read_fd: int, state: SignalState) -> None:
    """Reads signal numbers from the pipe until it is closed."""
    num_signals = 0
    while True:
        timeout = SIGNAL_GRACE_SECONDS if num_signals == 1 else None
        if not select.select([read_fd], [], [], timeout)[0]:
            num_signals += 1  # handled once: here or by the main loop
            if state.mode == "immediate":
                print(f"{NOTHING_TO_SAVE}.", flush=True)
                exit_immediately(EXIT_PREEMPTED)
            continue
        byte = os.read(read_fd, 1)
        if not byte:
            return
        if byte[0] in STOP_SIGNALS:
            num_signals += 1
            if num_signals > 1:
                exit_immediately(128 + byte[0])


def exit_immediately(code: int) -> None:
    """Exits the process from any thread, without cleanup."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def set_signal_mode(mode: SignalMode) -> None:
    """Sets the signal mode inside a `handle_signals` block."""
    if _active_signal_states:
        _active_signal_states[0].mode = mode
        if mode == "immediate":
            check_interrupted()


def check_interrupted() -> None:
    """Sends a heartbeat; raises `Interrupted` after a signal."""
    heartbeat()
    if (
        _active_signal_states
        and _active_signal_states[0].received
        and _active_signal_states[0].mode != "collective"
    ):
        raise Interrupted(NOTHING_TO_SAVE)


# Time and text of the last heartbeat, and the estimated seconds per step.
last_heartbeat: dict[str, Any] = {"at": -HEARTBEAT_INTERVAL_SECONDS, "text": "", "step": 0.0}


def heartbeat(step_seconds: float | None = None, long_operation: bool = False) -> None:
    """Writes the heartbeat file if there is a supervisor.

    The hang timeout follows the latest estimate of the seconds per step. It is longer
    before an operation that takes long without heartbeats.
    """
    path, now = os.environ.get(HEARTBEAT_ENV), time.monotonic()
    if path is None:
        return
    if step_seconds is not None:
        last_heartbeat["step"] = step_seconds
    timeout = HANG_STEPS * last_heartbeat["step"]
    busy_timeout = max(LONG_OPERATION_SECONDS, timeout) if long_operation else timeout
    content = f"{timeout:.3f} {busy_timeout:.3f}"
    if (
        content != last_heartbeat["text"]
        or now - last_heartbeat["at"] >= HEARTBEAT_INTERVAL_SECONDS
    ):
        with contextlib.suppress(OSError):
            Path(path).write_text(content)
        last_heartbeat.update(at=now, text=content)
