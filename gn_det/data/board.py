"""Which image each loading process is at, for the message when one hangs or is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info


class Board:
    """What each worker process is reading, seen by the main process: for the message when one hangs or dies.

    Args:
        workers: number of processes.
        name_of: file name of what a worker noted.
    """

    def __init__(self, workers: int, name_of: Callable[[int], str]) -> None:
        self._pids = RawArray("q", workers)
        self._reading = RawArray("q", [-1] * workers)
        self._name_of = name_of

    def __getstate__(self) -> dict[str, Any]:
        return {"_pids": self._pids, "_reading": self._reading}  # the main process alone asks for names

    def note(self, index: int) -> None:
        """Called in a worker: it turns to image ``index``; -1 is none."""
        info = get_worker_info()
        if info is not None:
            self._pids[info.id] = os.getpid()
            self._reading[info.id] = index

    def knows(self, pid: int) -> bool:
        """Whether that process got as far as to start its work."""
        return pid in list(self._pids)

    def describe(self, pid: int | None = None) -> str:
        """``worker 1 at a.jpg, ...``: the worker with that process id, or all that are reading; "" if none is."""
        found = [
            f"worker {worker} at {self._name_of(index)}"
            for worker, index in enumerate(self._reading)
            if index >= 0 and pid in (None, self._pids[worker])
        ]
        return ", ".join(found)
