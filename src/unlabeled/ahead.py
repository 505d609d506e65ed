"""Work done by threads a little before its results are wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

LOOKAHEAD = 64  # items that are made, or being made, before they are wanted

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(
    pool: ThreadPoolExecutor, make: Callable[[Given], Made], given: Iterable[Given], most: int = LOOKAHEAD
) -> Iterator[Made]:
    """What `make` makes of each, in order, by threads that are at most so many of them ahead."""
    waiting: deque[Future[Made]] = deque()
    try:
        for one in given:
            waiting.append(pool.submit(make, one))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
