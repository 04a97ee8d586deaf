"""Where the time to the first result goes, by a clock that the test turns."""

import logging

from gptjax import phases
from gptjax.phases import COMPILED, READ_BACK, Teller, reached, told


def test_the_seconds_of_a_phase_are_those_since_the_one_before_less_compiling():
    lines, now = [], [10.0]
    teller = Teller(lines.append, 8.0, "first token", lambda: now[0])

    def ended(phase):
        teller.emit(logging.makeLogRecord({"msg": phase}))

    ended("importing")
    now[0] = 13.0
    teller.heard(COMPILED, 0.5)
    ended("loading")
    now[0] = 20.0
    teller.heard(READ_BACK, 1.0)
    teller.heard(COMPILED, 2.0)
    ended("first token")
    ended("first token")

    assert [line.split()[:3] for line in lines] == [
        ["importing", "2.00", "s"],
        ["loading", "2.50", "s"],
        ["compiling", "2.50", "s"],
        ["first", "token", "5.00"],
        ["in", "all", "12.00"],
    ]
    assert "2 programs, 1 of them from a file" in lines[2]


def test_nothing_is_waited_for_or_said_unless_someone_listens(monkeypatch):
    waited, lines = [], []
    monkeypatch.setattr("jax.block_until_ready", waited.append)

    reached("loading", "before")
    with told(lines.append, 0.0, "first step"):
        reached("loading", "within")
        reached("first step", "last")
        reached("first step", "late")
    reached("loading", "after")

    assert waited == ["within", "last"]
    assert [line.split("  ")[0] for line in lines] == [
        *("loading", "compiling", "first step", "in all")
    ]
    assert not [h for h in phases.LOG.handlers if isinstance(h, Teller)]
    assert not phases.LOG.propagate


def test_what_has_no_first_token_is_answered_at_the_end():
    lines = []

    with told(lines.append, 0.0, "answering"):
        reached("loading")

    assert [line.split()[0] for line in lines] == [
        *("loading", "compiling", "answering", "in")
    ]
