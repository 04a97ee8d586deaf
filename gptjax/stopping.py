"""What a run owes to those who watch it: it stops when asked, and shows that it lives.

How a signal is answered depends on what would be lost:

    "leave"     nothing new is there to be saved: `Stopped` is raised on the spot
    "ask"       the signal is noted; the loops ask for it, save, and raise `Stopped`
    "together"  noted; the processes of a run ask each other, and stop as one
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

Mode = Literal["leave", "ask", "together"]
STOPPED = 75  # exit code; EX_TEMPFAIL of sysexits.h: try the same again
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTHING = "stopped with nothing left to save"
GRACE = 1.0  # seconds that Python gets to answer a signal; a compiler may keep it busy
ALIVE = "GPTJAX_ALIVE"  # names the file that says what a supervisor may expect
RARELY = 0.5  # seconds between two signs of life
PATIENCE = 20  # steps' time without one that are no hang
SLOW = 1800.0  # seconds without one while something runs that cannot give any


class Stopped(BaseException):
    """A signal asked the run to stop; everything is saved.

    It is no `Exception`, as it may come anywhere, and nothing is to swallow it.
    """


class Listener:
    """The signals that came, and how the next one is answered."""

    def __init__(self) -> None:
        """None has come."""
        self.came: list[int] = []
        self.mode: Mode = "ask"


LISTENING: list[Listener] = []  # at most one: signals are the process's own


@contextlib.contextmanager
def stop_signal(final: bool = False) -> Iterator[Callable[[], bool]]:
    """Yields a function that is true once SIGINT or SIGTERM came.

    The second signal ends the process at once, as if there were no handler. In a block
    inside of another one, nothing changes.

    Args:
        final: when this block ends, so does the process. Then a signal is answered even
            where Python does not get a word in, as while a program is compiled.
    """
    if LISTENING or threading.current_thread() is not threading.main_thread():
        yield lambda: bool(LISTENING and LISTENING[0].came)
        return
    here, before = Listener(), {n: signal.getsignal(n) for n in SIGNALS}

    def note(number: int, _: Any) -> None:
        here.came.append(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL if final else before[each])
        if here.mode == "leave":
            raise Stopped(NOTHING)

    LISTENING.append(here)
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        with watched(here) if final else contextlib.nullcontext():
            yield lambda: bool(here.came)
    except Exception as error:
        if here.came and here.mode == "leave":  # Orbax makes errors of any exception
            raise Stopped(NOTHING) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        LISTENING.clear()


@contextlib.contextmanager
def watched(here: Listener) -> Iterator[None]:
    """A thread answers the signals that the main one is too busy to hear of."""
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    thread = threading.Thread(target=watch, args=(receiving, here), daemon=True)
    before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(sending)
        thread.join()
        os.close(receiving)


def watch(receiving: int, here: Listener) -> None:
    """Reads the numbers of signals as they come, until the pipe is closed."""
    count = 0
    while True:
        waited = GRACE if count == 1 else None
        if not select.select([receiving], [], [], waited)[0]:
            count += 1  # it is answered below, or by the loop once it hears of it
            if here.mode == "leave":
                print(f"{NOTHING}.", flush=True)
                leave(STOPPED)
            continue
        byte = os.read(receiving, 1)
        if not byte:
            return
        if byte[0] in SIGNALS:
            count += 1
            if count > 1:
                leave(128 + byte[0])


def leave(code: int) -> None:
    """Ends the process from whatever thread, and whatever the others do."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def answer(mode: Mode) -> None:
    """Says how signals are answered from now on, within a block of `stop_signal`."""
    if LISTENING:
        LISTENING[0].mode = mode
        if mode == "leave":
            poll()


def poll() -> None:
    """Between two pieces of work: a sign of life, and `Stopped` if a signal came."""
    show_life()
    if LISTENING and LISTENING[0].came and LISTENING[0].mode != "together":
        raise Stopped(NOTHING)


SHOWN: dict[str, Any] = {
    "at": -RARELY,
    "text": "",
    "step": 0.0,
}  # the last sign of life


def show_life(step: float | None = None, slow: bool = False) -> None:
    """Tells the supervisor, where there is one, that this process gets on.

    Args:
        step: seconds that a step takes, where that is known anew.
        slow: what comes next may take long, and gives no sign in between.
    """
    path, now = os.environ.get(ALIVE), time.monotonic()
    if path is None:
        return
    if step is not None:
        SHOWN["step"] = step
    usual = PATIENCE * SHOWN["step"]
    text = f"{usual:.3f} {max(SLOW, usual) if slow else usual:.3f}"
    if text != SHOWN["text"] or now - SHOWN["at"] >= RARELY:
        with contextlib.suppress(OSError):
            Path(path).write_text(text)
        SHOWN.update(at=now, text=text)
