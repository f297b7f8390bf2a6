"""What the processes of the tests of ranks do; imports little, since each of them imports it anew."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from gn_det.engine import dist


def is_killed(first: int) -> None:
    """Rank ``first`` is killed by the system; the other sleeps and notices nothing."""
    if dist.rank() == first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def raises() -> None:
    """Rank 1 has a defect; the other waits for it in a collective and fails because of it."""
    if dist.rank() == 1:
        raise ZeroDivisionError("the defect")
    dist.gather_rows(torch.zeros(1))


def sleeps(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.faults.ranks import sleeps as target

    dist.launch(target, (sys.argv[1],), device="cpu", num_gpus=2)
