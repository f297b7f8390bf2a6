"""Threads beside the model: what happens to the calls that wait when the work is interrupted."""

from __future__ import annotations

import threading

import pytest

from gn_det.prediction.pipeline import in_thread


@pytest.mark.parametrize(("finish", "expected"), [(False, [0, 1]), (True, [0, 1, 2])])
def test_waiting_calls_after_an_interruption(finish: bool, expected: list[int]) -> None:
    """Images that nobody waits for are not read; frames that were detected are written."""
    done: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def call(item: int) -> None:
        if item == 1:
            begun.set()
            assert go.wait(10)
        done.append(item)

    calls = in_thread(call, range(10), finish=finish)
    next(calls).result()
    assert begun.wait(10)
    threading.Timer(0.2, go.set).start()  # while close() waits for it
    calls.close()
    assert done == expected
