"""Child processes end with the process that they work for, also where that one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gn_det.data.shapes import make_shapes

#: Takes one batch, says who loads, and waits to be killed while the loaders fill their queues.
SCRIPT = """
import sys, time
import multiprocessing
from gn_det.config import load_config
from gn_det.data.coco import load_coco
from gn_det.data.catalog import DatasetSource
from gn_det.data.loader import build_train_loader

cfg = load_config("quickstart.yaml", ["MODEL.DEVICE", "cpu"])
data = load_coco(DatasetSource("shapes", sys.argv[1], sys.argv[2]), max_bad=0)
batches = iter(build_train_loader(cfg, [data], images_per_rank=2, seed=1, start_batch=0, num_workers=4))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


#: The same for `gn-det check --images`: stops in the middle of the images.
CHECK = """
import sys, time
import multiprocessing
from pathlib import Path
from gn_det.check.decode import DecodeJob, decode_all
from gn_det.data.image import ImageReader

jobs = [DecodeJob(str(path), 0, 0, ImageReader()) for path in Path(sys.argv[2]).iterdir()] * 10
found = decode_all(jobs, workers=3)
next(found)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(("script", "number"), [(SCRIPT, 4), (CHECK, 3)], ids=["train", "check"])
def test_workers_end_with_a_killed_parent(script: str, number: int, tmp_path: Path) -> None:
    """Nobody is left, and whoever reads the output sees its end."""
    shapes = make_shapes(tmp_path / "shapes", "train", 12)
    words = [sys.executable, "-c", script, str(shapes.json_file), str(shapes.image_root)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == number and all(alive(w) for w in workers)
    process.kill()
    end = time.monotonic() + 120
    while any(alive(w) for w in workers) and time.monotonic() < end:
        time.sleep(0.2)
    left = [w for w in workers if alive(w)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
    assert process.stdout.read() == ""
