"""The next batches are made while the device works on this one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

DEPTH = 2  # batches ahead of the one in use


def prefetched(
    items: Iterable[Any], make: Callable[[Any], Any], depth: int = DEPTH
) -> Iterator[Any]:
    """`map(make, items)`, computed by another thread up to `depth` results ahead.

    Order and errors are those of `map`: an error is raised where its result is due.

    Args:
        items: read by that thread alone, one at a time.
        make: as a rule puts a batch on the devices.
        depth: results that may wait.
    """
    source, end = iter(items), object()

    def following() -> Any:
        item = next(source, end)
        return item if item is end else make(item)

    with ThreadPoolExecutor(1, "prefetch") as thread:
        queue = deque(thread.submit(following) for _ in range(depth))
        try:
            while queue:
                result = queue.popleft().result()
                if result is end:
                    return
                queue.append(thread.submit(following))
                yield result
        finally:  # whoever reads may stop early
            thread.shutdown(wait=True, cancel_futures=True)
