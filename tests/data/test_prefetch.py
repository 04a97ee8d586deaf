"""Prefetched batches are those of `map`, in the same order."""

import itertools
import threading

import pytest

from gptjax.data.prefetch import prefetch_to_device


@pytest.mark.parametrize("size", [1, 5])
def test_results_are_those_of_map(size):
    assert list(prefetch_to_device(range(9), lambda n: n * n, size)) == [n * n for n in range(9)]
    assert list(prefetch_to_device([], str, size)) == []


def test_the_next_results_are_made_while_one_is_in_use():
    made = [threading.Event() for _ in range(4)]

    def make(n):
        made[n].set()
        return n

    for n in prefetch_to_device(range(4), make, size=2):
        assert made[min(n + 2, 3)].wait(60)
        assert n > 0 or not made[3].is_set()


def test_errors_are_raised_in_place_of_the_result_and_no_thread_is_left():
    results = prefetch_to_device(itertools.chain([1, 0], itertools.count(2)), lambda n: 6 // n)

    assert next(results) == 6
    with pytest.raises(ZeroDivisionError):
        next(results)
    results = prefetch_to_device(itertools.count(), str)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
