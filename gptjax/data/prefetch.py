"""Prefetching of batches in a background thread."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

PREFETCH_SIZE = 2  # batches prepared ahead


def prefetch_to_device(
    items: Iterable[Any],
    make: Callable[[Any], Any],
    size: int = PREFETCH_SIZE,
    waiting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[Any]:
    """Yields `map(make, items)`, computed by a thread up to `size` results ahead.

    Order and errors are those of `map`: an error is raised in place of its result. Only
    the thread reads `items`, one at a time. Usually `make` transfers a batch to the
    devices. The consumer waits for each result inside the context `waiting()`.
    """
    source, end = iter(items), object()

    def next_result() -> Any:
        item = next(source, end)
        return item if item is end else make(item)

    with ThreadPoolExecutor(1, "prefetch") as thread:
        queue = deque(thread.submit(next_result) for _ in range(size))
        try:
            while queue:
                with waiting():
                    result = queue.popleft().result()
                if result is end:
                    return
                queue.append(thread.submit(next_result))
                yield result
        finally:  # the consumer may stop early
            thread.shutdown(wait=True, cancel_futures=True)
