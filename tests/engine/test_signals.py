"""A signal to the whole process group, as ``timeout`` and batch systems send it, ends a run in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gn_det.data.shapes import make_shapes

SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MAX_SIZE_TRAIN", "96", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "100000", "SEED", "1",
]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
def test_sigterm_to_the_process_group_saves(tmp_path: Path) -> None:
    """Loader workers get the signal, too; the main process writes a checkpoint and ends with 143."""
    data = make_shapes(tmp_path / "shapes", "train", 8)
    words = ["train", "--engine", "embedded", "--config", "quickstart.yaml", "--output", str(tmp_path / "run"), *SMALL]
    words += ["--train-json", data.json_file, "--train-images", data.image_root, "DATALOADER.NUM_WORKERS", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gn_det", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        metrics = tmp_path / "run" / "metrics.json"
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, err
    assert "interrupted (SIGTERM) after iteration" in err and "--resume" in err
    (checkpoint,) = (tmp_path / "run").glob("model_0*.pth")
    assert torch.load(checkpoint, weights_only=True)["iteration"] >= 19
