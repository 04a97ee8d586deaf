"""Times of phases and steps, by a clock that the test sets."""

from gptjax.runtime import timing
from gptjax.runtime.timing import COMPILE_EVENT, PhaseTimer, StepTimer


def set_times(monkeypatch, *times):
    monkeypatch.setattr(timing.time, "perf_counter", iter(times).__next__)


def test_a_phase_lasts_from_the_one_before_without_compilation(monkeypatch):
    lines = []
    timer = PhaseTimer(lines.append, 8.0, "loading")
    set_times(monkeypatch, 10.0, 13.0)

    timer.end_phase("importing")
    timer.on_jax_event(COMPILE_EVENT, 0.5)
    timer.end_phase("loading")

    assert [line.split()[1] for line in lines] == ["2.00", "0.50", "2.50", "5.00"]


def test_a_step_excludes_evaluation_and_counts_waiting(monkeypatch):
    set_times(monkeypatch, 1.0, 3.0, 3.5, 3.5, 10.0, 11.0, 11.0)
    timer = StepTimer()

    with timer.waiting():
        pass
    with timer.exclude():
        pass

    assert timer.end_step() == (3.5, 0.5)
    assert timer.end_step() == (0.0, 0.0)
