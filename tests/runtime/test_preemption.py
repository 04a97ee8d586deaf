"""Signals raise at once, or are recorded, or end a process that is blocked."""

import importlib
import signal
import subprocess
import sys
import time

import pytest

from gptjax.runtime import preemption
from gptjax.runtime.preemption import (
    Interrupted,
    check_interrupted,
    handle_signals,
    set_signal_mode,
)
from tests.conftest import ROOT


@pytest.mark.parametrize("number", preemption.STOP_SIGNALS)
def test_a_signal_raises_at_once_if_there_is_nothing_to_save(number):
    before = signal.getsignal(number)
    second = signal.SIGTERM if number == signal.SIGHUP else number

    with handle_signals():
        set_signal_mode("immediate")
        with pytest.raises(Interrupted):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGHUP)  # a closed terminal sends two
        with pytest.raises(KeyboardInterrupt):  # the second signal
            signal.raise_signal(second)

    assert signal.getsignal(number) is before


@pytest.fixture(autouse=True)
def default_sighup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup
    yield
    signal.signal(signal.SIGHUP, before)


def test_sighup_stays_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with handle_signals() as is_interrupted:
        signal.raise_signal(signal.SIGHUP)
        assert not is_interrupted()


def test_a_signal_does_not_interrupt_an_import(tmp_path, monkeypatch):
    source = "import signal\nsignal.raise_signal(signal.SIGTERM)\nis_complete = True\n"
    (tmp_path / "interrupted_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with handle_signals() as is_interrupted:
        set_signal_mode("immediate")
        assert importlib.import_module("interrupted_module").is_complete
        assert is_interrupted()


def test_a_signal_is_recorded_until_the_loops_poll_for_it():
    with handle_signals() as is_interrupted:
        assert not is_interrupted()
        with handle_signals() as is_interrupted_inside:
            signal.raise_signal(signal.SIGTERM)
        assert is_interrupted()
        assert is_interrupted_inside()
        set_signal_mode("collective")
        check_interrupted()  # the other processes have to agree first
        set_signal_mode("deferred")
        with pytest.raises(Interrupted):
            check_interrupted()
        with pytest.raises(Interrupted):
            set_signal_mode("immediate")

    check_interrupted()
    with handle_signals() as is_interrupted:  # a new block starts without a signal
        assert not is_interrupted()
        check_interrupted()


@pytest.mark.parametrize(("mode", "error"), [("immediate", Interrupted), ("deferred", ValueError)])
def test_an_error_that_wraps_an_interruption_is_one(mode, error):
    with pytest.raises(error), handle_signals():  # noqa: PT012
        set_signal_mode(mode)
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise ValueError("cannot read")  # as some libraries do


BUSY = """
import hashlib, sys
from gptjax.runtime.preemption import handle_signals, set_signal_mode
with handle_signals(final=True):
    set_signal_mode(sys.argv[1])
    print("ready", flush=True)
    hashlib.scrypt(b"", salt=b"", n=1 << 14, r=8, p=9999, maxmem=1 << 30)  # minutes
"""


@pytest.mark.parametrize(
    ("mode", "signals", "code"),
    [
        ("immediate", [signal.SIGHUP], 75),
        ("deferred", [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], 128 + signal.SIGTERM),
    ],
)
def test_signals_end_a_process_that_is_blocked(mode, signals, code):
    command = [sys.executable, "-c", BUSY, mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            for number in signals:
                time.sleep(0.3)  # blocked by now; and two signals at once would be one
                process.send_signal(number)
            assert process.wait(60) == code
        finally:
            process.kill()
