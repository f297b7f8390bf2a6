"""Stages that run in threads beside the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

#: How many calls are made ahead.
AHEAD = 2


def in_thread(
    function: Callable[[In], Out], items: Iterable[In], ahead: int = AHEAD, *, finish: bool = False
) -> Generator[Future[Out], None, None]:
    """Call ``function`` in one thread, at most ``ahead`` calls early, and yield the futures in order.

    When the generator is closed, or ``items`` raises, it waits for the call that has begun, and drops those that have
    not, unless they are to ``finish``.
    """
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=not finish)
