"""Processes that do not outlive the one that they work for."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time


def end_with_parent() -> None:
    """Call in a child process: it ends within about a second of its parent, however that one ended.

    Loading processes of torch notice it themselves, but then wait for room in their queue, which nobody reads: each of
    them keeps the others' pipes open, so that all stay for ever, with whatever output they share. Those of a pool wait
    for work.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_watch, args=(parent.pid,), name="gn_det-parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
