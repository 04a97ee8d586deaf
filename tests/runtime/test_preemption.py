"""Signals: raised on the spot, noted, or heard of by a thread."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax.runtime import preemption
from gptjax.runtime.preemption import (
    Interrupted,
    check_interrupted,
    handle_signals,
    heartbeat,
    set_signal_mode,
)
from tests.processes import ROOT


@pytest.mark.parametrize("number", preemption.STOP_SIGNALS)
def test_a_signal_is_raised_on_the_spot_where_nothing_would_be_lost(number):
    before = signal.getsignal(number)
    with handle_signals():
        set_signal_mode("immediate")
        with pytest.raises(Interrupted):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def read_badly(came):
    """As a library does that makes an error of any exception."""
    try:
        if came:
            signal.raise_signal(signal.SIGTERM)
        raise OSError
    except BaseException as error:
        raise ValueError("cannot read") from error


@pytest.mark.parametrize(
    ("mode", "came", "seen"),
    [
        ("immediate", True, Interrupted),
        ("immediate", False, ValueError),
        ("deferred", True, ValueError),
    ],
)
def test_of_errors_only_those_that_a_signal_caused_are_one(mode, came, seen):
    def run():
        with handle_signals():
            set_signal_mode(mode)
            read_badly(came)

    with pytest.raises(seen):
        run()


def test_a_signal_is_noted_until_somebody_asks_where_something_would_be_lost():
    with handle_signals() as came:
        signal.raise_signal(signal.SIGTERM)
        assert came()
        set_signal_mode("collective")
        check_interrupted()  # the other processes have to know first
        set_signal_mode("deferred")
        with pytest.raises(Interrupted):
            check_interrupted()


def test_outside_of_a_block_nothing_is_asked_and_nothing_raised():
    check_interrupted()
    set_signal_mode("immediate")
    with handle_signals() as came:
        assert not came()


def test_a_block_inside_of_another_one_changes_nothing():
    with handle_signals() as outer:
        handler = signal.getsignal(signal.SIGTERM)
        with handle_signals() as inner:
            assert signal.getsignal(signal.SIGTERM) is handler
        signal.raise_signal(signal.SIGTERM)
        assert outer()
        assert inner()


BUSY = """
import hashlib, sys
from gptjax.runtime.preemption import handle_signals, set_signal_mode
with handle_signals(final=True):
    set_signal_mode(sys.argv[1])
    print("ready", flush=True)
    hashlib.scrypt(b"", salt=b"", n=1 << 14, r=8, p=9999, maxmem=1 << 30)  # minutes
"""


@pytest.mark.parametrize(
    ("mode", "signals", "code"), [("immediate", 1, 75), ("deferred", 2, 128 + signal.SIGTERM)]
)
def test_a_process_that_is_busy_in_c_is_ended_all_the_same(mode, signals, code):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(signals):
            time.sleep(0.5)  # it is in C by now; and two at once would be one
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_signs_of_life_say_how_long_there_may_be_none(tmp_path, monkeypatch):
    sign = tmp_path / "alive"
    monkeypatch.setenv(preemption.HEARTBEAT_ENV, str(sign))
    monkeypatch.setattr(preemption, "last_heartbeat", {"at": 0.0, "text": "", "step": 0.0})

    heartbeat(step_seconds=0.5)
    assert sign.read_text() == "10.000 10.000"
    heartbeat(long_operation=True)
    assert sign.read_text() == "10.000 1800.000"
    sign.unlink()
    heartbeat(long_operation=True)
    assert not sign.exists()  # rarely enough
    check_interrupted()
    assert Path(sign).read_text() == "10.000 10.000"
