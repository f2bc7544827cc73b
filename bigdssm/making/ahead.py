"""Work done ahead in other threads, its results in order, so that the main thread waits little."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 2  # the library that takes most of the time has threads of its own
In = TypeVar("In")
Out = TypeVar("Out")


def ahead(work: Callable[[In], Out], items: Iterable[In]) -> Iterator[tuple[In, Out]]:
    """Yield each item with what `work` makes of it, while that of the next ones is being made."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[tuple[In, Future[Out]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > THREADS:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()
