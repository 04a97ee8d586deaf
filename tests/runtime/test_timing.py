"""Times of steps and of long loops, by a clock that the test sets."""

from gptjax.runtime import timing
from tests.runs import capture_lines


def test_a_step_excludes_evaluation_and_counts_waiting(monkeypatch):
    times = iter([1.0, 3.0, 3.5, 3.5, 10.0, 11.0, 11.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    timer = timing.StepTimer()

    with timer.waiting():
        pass
    with timer.exclude():
        pass

    assert [timer.end_step() for _ in range(2)] == [(3.5, 0.5), (0.0, 0.0)]


def test_a_long_loop_logs_its_progress_and_the_time_left_ever_more_rarely(monkeypatch):
    times = iter(range(1000))  # one second per item
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))

    with capture_lines([]) as lines:
        assert list(timing.log_progress("x" * 100, 100, "encoding", "texts")) == ["x"] * 100
        assert list(timing.log_progress("abc", 3, "encoding", "texts")) == [*"abc"]

    assert [int(line.split()[1]) for line in lines] == [3, 8, 18, 38, 78]
    assert lines[2] == "encoding 18 of 100 texts, about 1m27s left"
    with capture_lines([]) as lines:
        assert sum(1 for _ in timing.log_progress("abcde", None, "reading", "rows")) == 5
    assert lines == ["reading  3 rows"]
