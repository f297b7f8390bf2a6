"""End a child process when its parent is gone."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time


def end_with_parent() -> None:
    """Call in a child process: it exits within about a second of its parent, however the parent ended.

    The parent's process id is polled. Its sentinel would not do: processes forked later hold the other end of that pipe
    open. torch's loading processes do notice a dead parent, but then wait for room in a queue that nobody reads.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_watch, args=(parent.pid,), name="gn_det-parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
