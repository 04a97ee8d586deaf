"""Graceful preemption: SIGINT, SIGTERM and SIGHUP end a command with progress saved.

The effect of the first signal depends on the mode; a second one exits at once, except
for SIGHUP, which both the shell and the kernel send when a terminal closes.

    "immediate"   no unsaved progress: raises `Interrupted` at once
    "deferred"    recorded: the run finishes the step, saves and raises `Interrupted`
    "collective"  recorded: all processes of a run agree on the step to stop at
"""

import contextlib
import os
import select
import signal
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

from gptjax.runtime.terminal import print_message

SignalMode = Literal["immediate", "deferred", "collective"]
EXIT_PREEMPTED = 75  # exit code; EX_TEMPFAIL of sysexits.h: retry
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTHING_TO_SAVE = "interrupted; no unsaved progress"
SIGNAL_GRACE_SECONDS = 1.0  # for Python to handle a signal, e.g. while compiling
HEARTBEAT_ENV = "GPTJAX_HEARTBEAT"  # environment variable: path of the heartbeat file


class Interrupted(BaseException):
    """The command was interrupted by a signal; all progress is saved.

    Not an `Exception`, so that no handler swallows it.
    """


# Signal handlers are per process.
_state = types.SimpleNamespace(active=False, received=False, mode="deferred")


@contextlib.contextmanager
def handle_signals(final: bool = False) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once a stop signal was received.

    A block inside another one, or outside the main thread, changes nothing. If the
    process exits after the block (`final`), signals are handled even while Python is
    blocked, for example by compilation.
    """
    if _state.active or threading.current_thread() is not threading.main_thread():
        yield lambda: _state.received
        return

    def on_signal(number: int, frame: Any) -> None:
        if _state.received and number == signal.SIGHUP:
            return
        if _state.received:
            os._exit(128 + number) if final else signal.default_int_handler(number, frame)
        _state.received = True
        # An exception may crash an import of C code; `_watch_signals` exits instead.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(frame)]
        if _state.mode == "immediate" and "<frozen importlib._bootstrap>" not in files:
            raise Interrupted(NOTHING_TO_SAVE)

    vars(_state).update(active=True, received=False, mode="deferred")
    try:
        watcher = _watch_signals(on_signal) if final else contextlib.nullcontext()
        with on_stop_signals(on_signal), watcher:
            yield lambda: _state.received
    except Exception as error:
        if _state.received and _state.mode == "immediate":  # Orbax wraps any exception
            raise Interrupted(NOTHING_TO_SAVE) from error
        raise
    finally:
        vars(_state).update(active=False, received=False)


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Installs a handler of the stop signals for the block."""
    previous_handlers = set_stop_handler(handler)
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)


def set_stop_handler(handler: Any) -> dict[signal.Signals, Any]:
    """Sets the handler of the stop signals; returns the previous ones.

    SIGHUP stays ignored if it is, as under nohup.
    """
    is_hup_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or not is_hup_ignored]
    return {number: signal.signal(number, handler) for number in numbers}


def report_interruption(reason: object = NOTHING_TO_SAVE) -> None:
    """Prints why the command ends."""
    start = "the last checkpoint, if any" if reason == NOTHING_TO_SAVE else "there"
    print_message(f"{reason}. The same command continues from {start}.")


def exit_interrupted(*_: Any) -> NoReturn:
    """Exits at once, as there is nothing to save."""
    report_interruption()
    os._exit(EXIT_PREEMPTED)


@contextlib.contextmanager
def _watch_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Exits from a thread if the main thread is blocked and cannot call the handler."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)

    def watch() -> None:
        with open(read_fd, "rb", buffering=0) as pipe:

            def next_signal() -> int:
                while byte := pipe.read(1):
                    if signal.getsignal(byte[0]) is handler:  # else the command has its own
                        return byte[0]
                return 0  # the block has ended

            if not next_signal():
                return
            is_quiet = not select.select([pipe], [], [], SIGNAL_GRACE_SECONDS)[0]
            if is_quiet and _state.mode == "immediate":
                exit_interrupted()
            while number := next_signal():
                if number != signal.SIGHUP:
                    os._exit(128 + number)

    previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        os.close(write_fd)  # ends the thread
        thread.join()  # it may be about to exit: only one of the threads prints


def set_signal_mode(mode: SignalMode) -> None:
    """Sets the signal mode inside a `handle_signals` block."""
    if _state.active:
        _state.mode = mode
        if mode == "immediate":
            check_interrupted()


def check_interrupted() -> None:
    """Sends a heartbeat; raises `Interrupted` after a signal."""
    heartbeat()
    if _state.received and _state.mode != "collective":
        raise Interrupted(NOTHING_TO_SAVE)


def heartbeat(step: int | None = None) -> None:
    """Tells a supervisor that the run is alive, or has finished a step."""
    if (path := os.environ.get(HEARTBEAT_ENV)) is None:
        return
    with contextlib.suppress(OSError):
        if step is None:
            os.utime(path)
        else:
            with open(path, "r+b", buffering=0) as file:
                file.write(b"%020d" % step)  # one write of a fixed size: never cut short
