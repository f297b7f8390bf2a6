"""Child processes end with the process that they work for, also where that one is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gn_det.check.decode import decode_all
from gn_det.config import load_config
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import load_coco
from gn_det.data.image import ImageReader
from gn_det.data.loader import build_train_loader
from gn_det.data.records import Record
from gn_det.data.shapes import make_shapes


def train(source: DatasetSource) -> object:
    """Take one batch; the loaders then fill their queues."""
    cfg = load_config("quickstart.yaml", ["MODEL.DEVICE", "cpu"])
    data = load_coco(source, max_bad=0)
    batches = iter(build_train_loader(cfg, [data], images_per_rank=2, seed=1, start_batch=0, num_workers=4))
    next(batches)
    return batches


def check(source: DatasetSource) -> object:
    """`gn-det check --images`, stopped in the middle of the images."""
    records = [Record(file_name=str(path), width=0, height=0) for path in Path(source.image_root).iterdir()] * 10
    found = decode_all(records, ImageReader(), workers=3)
    next(found)
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def stay(work: Callable[[DatasetSource], object], source: DatasetSource, output: int) -> None:
    """In a process of its own: begin the work, say who helps, and wait to be killed."""
    kept = work(source)
    pids = " ".join(str(child.pid) for child in multiprocessing.active_children())
    os.write(output, f"{pids}\n".encode())
    time.sleep(600)
    del kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("work", "number"), [(train, 4), (check, 3)])
def test_workers_end_with_a_killed_parent(work: Callable[[DatasetSource], object], number: int, tmp_path: Path) -> None:
    """Nobody is left, and whoever reads the output sees its end."""
    source = make_shapes(tmp_path / "shapes", "train", 12)
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            os.close(reading)
            os.set_inheritable(writing, True)
            stay(work, source, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as output:
        workers = [int(word) for word in output.readline().split()]
        assert len(workers) == number and all(alive(w) for w in workers)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        end = time.monotonic() + 120
        while any(alive(w) for w in workers) and time.monotonic() < end:
            time.sleep(0.2)
        left = [w for w in workers if alive(w)]
        for worker in left:
            os.kill(worker, signal.SIGKILL)
        assert not left and output.read() == ""
