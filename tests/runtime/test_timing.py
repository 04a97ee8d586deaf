"""Times of steps, by a clock that the test sets."""

from gptjax.runtime import timing


def test_a_step_excludes_evaluation_and_counts_waiting(monkeypatch):
    times = iter([1.0, 3.0, 3.5, 3.5, 10.0, 11.0, 11.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    timer = timing.StepTimer()

    with timer.waiting():
        pass
    with timer.exclude():
        pass

    assert [timer.end_step() for _ in range(2)] == [(3.5, 0.5), (0.0, 0.0)]
