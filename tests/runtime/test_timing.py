"""Where the time to the first result goes, by a clock that the test turns."""

import logging

from gptjax.runtime import timing
from gptjax.runtime.timing import (
    CACHE_HIT_EVENT,
    COMPILE_EVENT,
    PhaseLogger,
    log_phases,
    mark_phase,
)


def test_the_seconds_of_a_phase_are_those_since_the_one_before_less_compiling():
    lines, now = [], [10.0]
    teller = PhaseLogger(lines.append, 8.0, "first token", lambda: now[0])

    def ended(phase):
        teller.emit(logging.makeLogRecord({"msg": phase}))

    ended("importing")
    now[0] = 13.0
    teller.on_jax_event(COMPILE_EVENT, 0.5)
    ended("loading")
    now[0] = 20.0
    teller.on_jax_event(CACHE_HIT_EVENT, 1.0)
    teller.on_jax_event(COMPILE_EVENT, 2.0)
    ended("first token")
    ended("first token")

    assert [line.split()[:3] for line in lines] == [
        ["importing", "2.00", "s"],
        ["loading", "2.50", "s"],
        ["compiling", "2.50", "s"],
        ["first", "token", "5.00"],
        ["total", "12.00", "s"],
    ]
    assert "2 programs, 1 from the cache" in lines[2]


def test_nothing_is_waited_for_or_said_unless_someone_listens(monkeypatch):
    waited, lines = [], []
    monkeypatch.setattr("jax.block_until_ready", waited.append)

    mark_phase("loading", "before")
    with log_phases(lines.append, 0.0, "first step"):
        mark_phase("loading", "within")
        mark_phase("first step", "last")
        mark_phase("first step", "late")
    mark_phase("loading", "after")

    assert waited == ["within", "last"]
    assert [line.split("  ")[0] for line in lines] == [
        *("loading", "compiling", "first step", "total")
    ]
    assert not [h for h in timing.phase_logger.handlers if isinstance(h, PhaseLogger)]
    assert not timing.phase_logger.propagate


def test_what_has_no_first_token_is_answered_at_the_end():
    lines = []

    with log_phases(lines.append, 0.0, "answering"):
        mark_phase("loading")

    assert [line.split()[0] for line in lines] == [*("loading", "compiling", "answering", "total")]
