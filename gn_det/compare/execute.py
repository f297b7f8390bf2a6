"""One run of a comparison: trained with the functions of the commands, then measured from its output."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from gn_det.classification import Settings, pretrain
from gn_det.compare.columns import AP_METRICS
from gn_det.compare.plan import Job, Plan
from gn_det.config.defaults import edited
from gn_det.engine import run
from gn_det.engine.engines import Engine
from gn_det.engine.log import LOG_FILE
from gn_det.engine.output import FINAL, METRICS
from gn_det.errors import TrainingError
from gn_det.visualize.plots import read_metrics

#: Warm-up images, timed images, and time limit of the inference benchmark.
TIMED, UNTIMED, TIMED_SECONDS = 16, 2, 60.0


@dataclass
class Outcome:
    """Results of a run: fields of :class:`gn_det.compare.runner.Record`. The weights are in its folder."""

    metrics: dict[str, float | None]
    curve: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float | None] = field(default_factory=dict)
    size: dict[str, float | None] = field(default_factory=dict)
    config: str = ""


def execute(job: Job, folder: Path, weights: str, *, plan: Plan, measuring: bool = True) -> Outcome:
    """Run or resume ``job`` in ``folder``: a detection row on the plan's engine, or a pre-training row.

    Args:
        weights: of the pre-training row that a detection row starts from, else "".
        measuring: False for ranks of torchrun that only train.
    """
    _reset_peak_memory()
    if job.cfg is None:
        settings = Settings.from_dict({**job.settings, "output": str(folder)})
        summary = pretrain(settings, resume=True, num_gpus=plan.num_gpus)
        return _of_pretraining(settings, summary) if measuring else Outcome({})
    cfg = edited(job.cfg, {"OUTPUT_DIR": str(folder), "MODEL.WEIGHTS": weights or job.cfg.MODEL.WEIGHTS})
    results = run.train(cfg, engine=plan.engine, resume=True, num_gpus=plan.num_gpus)
    return _of_detection(cfg, plan.engine, results) if measuring else Outcome({})


def _of_pretraining(settings: Settings, summary: Mapping[str, Any]) -> Outcome:
    curve = summary["curve"]
    metrics = {name: summary[name] for name in ("top1_error", "top5_error") if name in summary}
    metrics["train_error"] = curve[-1].get("train_error") if curve else None
    points = {"x": "epoch", "loss": "train_loss", "top1_error": "val_error", "train_error": "train_error"}
    costs = {
        "s_per_iter": "seconds_per_iteration",
        "memory_mb": "peak_memory_mb",
        "s_per_image": "inference_seconds_per_image",
    }
    return Outcome(
        metrics,
        [{name: float(point[key]) for name, key in points.items()} for point in curve]
        + [{"x": point.pop("epoch"), **point} for point in map(dict, summary.get("recorded", ()))],
        {name: summary.get(key) for name, key in costs.items()},
        {"parameters": summary.get("parameters")},
        json.dumps(settings.to_dict(), indent=1),
    )


def _of_detection(cfg: CfgNode, engine: Engine, results: Mapping[str, float]) -> Outcome:
    from gn_det.data.sets import load_first_test_set
    from gn_det.data.split import split_keys
    from gn_det.prediction.predictor import load_predictor

    folder = Path(cfg.OUTPUT_DIR)
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    held_out = load_first_test_set(split_keys(cfg))
    metrics = detection_metrics(results)
    if metrics.get("box_ap") is None:
        if not held_out.object_counts.any():
            raise TrainingError(f"data: {held_out.json_file} has no object, so there is no AP to compare")
        # a model that detects nothing has undefined precision, which a comparison counts as zero
        tasks = ("box", "mask") if cfg.MODEL.MASK_ON else ("box",)
        metrics = {f"{task}_ap{limit}": 0.0 for task in tasks for limit in ("", "50", "75")}
    predictor = load_predictor(folder / FINAL, device=cfg.MODEL.DEVICE, engine=engine)
    assert predictor.module is not None
    images = [Path(r["file_name"]) for r, _ in zip(held_out.records, range(UNTIMED + TIMED))]
    entries = read_metrics(folder / METRICS)
    times = [e["time"] for e in entries if isinstance(e.get("time"), (int, float))]
    cost = {
        "s_per_iter": statistics.median(times) if times else None,  # None: too short to time
        "memory_mb": _logged_memory_mb(folder),
        "s_per_image": seconds_per_image(predictor.detect, images),
    }
    size: dict[str, float | None] = {"parameters": float(sum(p.numel() for p in predictor.module.parameters()))}
    return Outcome(metrics, detection_curve(entries), cost, size, text)


def detection_metrics(results: Mapping[str, float]) -> dict[str, float | None]:
    """Return the columns of an evaluation's flat results (for several sets, of the first)."""
    prefix = next((k.removesuffix("bbox/AP") for k in results if k.endswith("bbox/AP")), "")
    found = {column: results.get(prefix + metric) for column, metric in AP_METRICS.items()}
    # -1 and nan: no object of that size
    return {c: float(v) if math.isfinite(v) and v >= 0 else None for c, v in found.items() if v is not None}


def detection_curve(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return points ``{"x": iterations done, "loss", "box_ap", "mask_ap"}`` from the entries of a metrics.json."""
    points = []
    for entry in entries:
        point = {"x": float(entry["iteration"] + ("total_loss" in entry))}
        for name, key in (("loss", "total_loss"), ("box_ap", "bbox/AP"), ("mask_ap", "segm/AP")):
            value = next((v for k, v in entry.items() if k == key or k.endswith(f"/{key}")), None)
            if isinstance(value, (int, float)) and math.isfinite(value):
                point[name] = float(value)
        if len(point) > 1:
            points.append(point)
    return points


def _logged_memory_mb(folder: Path) -> float | None:
    """Return the peak memory in the run's log: of GPU tensors, or of the process on a CPU."""
    text = ""
    with suppress(OSError):
        text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"max_mem: (\d+)M", text)
    return float(found[-1]) if found else None


def _reset_peak_memory() -> None:
    """Reset the peak memory, because the rows of a suite share a process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def seconds_per_image(detect: Callable[[Path], Any], images: Sequence[Path]) -> float | None:
    """Return the median time from file to detections, one image at a time; None without images."""
    times: list[float] = []
    started = time.perf_counter()
    for number, path in enumerate(images):
        begun = time.perf_counter()
        detect(path)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= min(UNTIMED, len(images) - 1):
            times.append(time.perf_counter() - begun)
        if times and time.perf_counter() - started > TIMED_SECONDS:
            break
    return statistics.median(times) if times else None
