"""Prefetched batches are those of `map`, in the same order."""

import itertools
import threading

import pytest

from gptjax.training.trainer import prefetch_to_device


def test_results_are_those_of_map_and_made_ahead():
    made = [threading.Event() for _ in range(4)]

    def make(n):
        made[n].set()
        return 2 * n

    results = []
    for result in prefetch_to_device(range(4), make, size=2):
        results.append(result)
        assert made[min(len(results) + 1, 3)].wait(60)
        assert len(results) > 1 or not made[3].is_set()

    assert results == [0, 2, 4, 6]


def test_errors_are_raised_in_place_of_the_result_and_no_thread_is_left():
    results = prefetch_to_device(itertools.chain([1, 0], itertools.count(2)), lambda n: 6 // n)

    assert next(results) == 6
    with pytest.raises(ZeroDivisionError):
        next(results)
    results = prefetch_to_device(itertools.count(), str)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
