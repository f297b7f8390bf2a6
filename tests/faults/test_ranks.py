"""One process of several dies: the others end soon, the cause comes first, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gn_det.engine import dist
from gn_det.errors import TrainingError
from tests.faults import ranks


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_GRACE_SECONDS", 1.0)
    with pytest.raises(TrainingError, match=r"^training process 1 was killed by SIGKILL, .*memory.*--resume$"):
        dist.launch(ranks.is_killed, (1,), device="cpu", num_gpus=2)


def test_the_first_error_is_told_not_what_followed_from_it() -> None:
    """The other rank waits in a collective whose own limit is half an hour; nobody waits for that."""
    with pytest.raises(RuntimeError, match=r"training process 1 failed first:\n(.*\n)*ZeroDivisionError: the defect"):
        dist.launch(ranks.raises, (), device="cpu", num_gpus=2)


def is_running(process: int) -> bool:
    """Zombies, which a container without an init keeps, do not count."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """kill -9 of the process that started them, as a scheduler or a user does it."""
    command = [sys.executable, ranks.__file__, str(tmp_path)]
    parent = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        assert parent.poll() is None
        time.sleep(0.1)
    children = [int(f.name) for f in tmp_path.iterdir()]
    assert len(children) == 2 and all(map(is_running, children))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 120  # only ends a hang
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [c for c in children if is_running(c)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert left == []
