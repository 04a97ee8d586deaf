"""Batches made ahead: the same ones in the same order, and the time waited for them."""

import itertools
import threading

import pytest

from gptjax.data.prefetch import prefetch_to_device
from gptjax.runtime.timing import StepTimer


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_it_is_map(depth):
    assert list(prefetch_to_device(range(9), lambda n: n * n, depth)) == [n * n for n in range(9)]
    assert list(prefetch_to_device([], str, depth)) == []


def test_the_next_ones_are_made_while_one_is_in_use():
    """None of the waits could end otherwise."""
    made = [threading.Event() for _ in range(4)]

    def make(n):
        made[n].set()
        return n

    for n in prefetch_to_device(range(4), make, size=2):
        assert made[min(n + 2, 3)].wait(60)
        assert n == 3 or not (n + 3 < 4 and made[n + 3].is_set())


def test_an_error_comes_where_its_batch_is_due():
    results = prefetch_to_device([1, 0, 2], lambda n: 6 // n)

    assert next(results) == 6
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_whoever_stops_early_leaves_no_thread():
    results = prefetch_to_device(itertools.count(), str)
    next(results)

    results.close()

    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def share_waited(source_seconds, step_seconds):
    """As the loop counts it, by a clock that only source and step turn."""
    now = [0.0]

    watch = StepTimer(lambda: now[0])
    for n in range(10):
        with watch.waiting():
            now[0] += source_seconds
        now[0] += step_seconds
        if n == 4:
            seconds, waited = watch.end_step()
            assert seconds == pytest.approx(5 * (source_seconds + step_seconds))
    with watch.exclude():
        now[0] += 100.0  # an evaluation
    seconds, again = watch.end_step()
    assert again == pytest.approx(waited)
    return again / seconds


def test_the_share_that_is_waited_is_near_one_for_a_slow_source():
    assert share_waited(99.0, 1.0) == pytest.approx(0.99)


def test_the_share_that_is_waited_is_near_zero_for_a_fast_source():
    assert share_waited(0.01, 0.99) == pytest.approx(0.01)
