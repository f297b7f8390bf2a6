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
    function: Callable[[In], Out], items: Iterable[In], ahead: int = AHEAD
) -> Generator[Future[Out], None, None]:
    """Call ``function`` in one thread, at most ``ahead`` calls early, and yield the futures in order.

    When the generator is closed, or ``items`` raises, it first waits for the calls that it has begun.
    """
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
