"""Smoothing, metrics.json, the log line, and the folder rules."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from gn_det.engine.loggers import JsonLogger
from gn_det.engine.output import refuse_old_run, start_afresh, trim_metrics
from gn_det.engine.scalars import EventLog, Metrics, progress_line
from gn_det.errors import TrainingError


def test_median_of_the_last_twenty(tmp_path: Path) -> None:
    """Noisy scalars are medians of 20; evaluation results and lr are taken as they are; nothing is written twice."""
    writer = JsonLogger(str(tmp_path / "metrics.json"))
    metrics = Metrics([writer])
    log = metrics.log
    for i in range(40):
        log.put({"total_loss": 1000.0 if i < 20 else float(i)}, i)
        log.put({"lr": i / 100}, i, smooth=False)
    metrics.write()
    metrics.write()
    log.put({"bbox/AP": math.nan}, 40, smooth=False)
    metrics.write()
    writer.close()
    first, second = (tmp_path / "metrics.json").read_text().splitlines()
    assert json.loads(first) == {"iteration": 39, "lr": 0.39, "total_loss": 29.5}
    assert json.loads(second) == {"iteration": 40, "bbox/AP": None}  # nan is not JSON


def test_log_line_has_detectron2s_fields() -> None:
    log = EventLog()
    log.put({"data_time": 0.01, "total_loss": 1.5, "loss_cls": 1.0, "loss_mask": 0.5}, 19)
    log.put({"lr": 0.02}, 19, smooth=False)
    log.put({"time": 0.25}, 19)
    log.put({"eta_seconds": 3661.0}, 19, smooth=False)
    line = progress_line(log, 19)
    assert re.search(
        r"eta: 1:01:01  iter: 19  total_loss: 1\.5  loss_cls: 1  loss_mask: 0\.5  time: 0\.2500  last_time: 0\.2500  "
        r"data_time: 0\.0100  last_data_time: 0\.0100  lr: 0\.02  max_mem: \d+M",
        line,
    )


def test_an_old_run_is_not_overwritten_silently(tmp_path: Path) -> None:
    for name in ("model_best.pth", "model_0000009.pth", "last_checkpoint", "weights_of_mine.pth"):
        (tmp_path / name).write_text("x")
    (tmp_path / "metrics.json").write_text("{}\n")
    with pytest.raises(TrainingError, match="--resume"):
        refuse_old_run(tmp_path, overwrite=False)
    refuse_old_run(tmp_path, overwrite=True)
    start_afresh(tmp_path, keep=str(tmp_path / "model_best.pth"))
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {"model_best.pth", "weights_of_mine.pth", "metrics.json.1"}
    (tmp_path / "metrics.json").write_text("{}\n")
    start_afresh(tmp_path)
    assert (tmp_path / "metrics.json.2").exists() and not (tmp_path / "model_best.pth").exists()


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"iteration": 19, "total_loss": 1.0},
        {"iteration": 39, "total_loss": 1.0},
        {"iteration": 30, "bbox/AP": 1.0},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"iteration": 4')
    trim_metrics(tmp_path, 29)
    kept = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert kept == [19, 30]  # the final evaluation of a run of 30 iterations stays
