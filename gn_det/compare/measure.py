"""What a finished run cost and how it went, read from the files that every run writes."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gn_det.engine.log import LOG_FILE
from gn_det.engine.output import METRICS
from gn_det.visualize.plots import read_metrics

#: Column -> name in an evaluation's results.
_AP = {"": "AP", "50": "AP50", "75": "AP75", "_s": "APs", "_m": "APm", "_l": "APl"}
#: Images whose inference is timed after some that are not; and the time after which it ends.
TIMED, UNTIMED, TIMED_SECONDS = 16, 2, 60.0


def detection_metrics(results: Mapping[str, float]) -> dict[str, float | None]:
    """The columns of an evaluation's flat results (of the first set where there are several)."""
    prefix = next((k.removesuffix("bbox/AP") for k in results if k.endswith("bbox/AP")), "")
    out: dict[str, float | None] = {}
    for task, name in (("box", "bbox"), ("mask", "segm")):
        for column, metric in _AP.items():
            value = results.get(f"{prefix}{name}/{metric}")
            if value is not None:
                # -1 and nan: there is no object of that size
                out[f"{task}_ap{column}"] = float(value) if math.isfinite(value) and value >= 0 else None
    return out


def detection_curve(folder: Path) -> list[dict[str, float]]:
    """Points ``{"x": iterations done, "loss", "box_ap", "mask_ap"}`` of a detection run, from its metrics.json."""
    points = []
    for entry in read_metrics(folder / METRICS):
        point = {"x": float(entry["iteration"] + ("total_loss" in entry))}
        names = {"loss": "total_loss", "box_ap": "bbox/AP", "mask_ap": "segm/AP"}
        for name, key in names.items():
            value = next((v for k, v in entry.items() if k == key or k.endswith(f"/{key}")), None)
            if isinstance(value, (int, float)) and math.isfinite(value):
                point[name] = float(value)
        if len(point) > 1:
            points.append(point)
    return points


def seconds_per_iteration(folder: Path) -> float | None:
    """Median over the training, without evaluations and checkpoints; None for a run too short to time."""
    times = [e["time"] for e in read_metrics(folder / METRICS) if isinstance(e.get("time"), (int, float))]
    return statistics.median(times) if times else None


def logged_memory_mb(folder: Path) -> float | None:
    """Peak memory as the run's log has it: of the GPU's tensors, or of the process on a CPU."""
    try:
        text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.findall(r"max_mem: (\d+)M", text)
    return float(found[-1]) if found else None


def reset_peak_memory() -> None:
    """Let the peak begin here: rows of a suite share a process, and must not be charged with what came before."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def seconds_per_image(detect: Callable[[Path], Any], images: Sequence[Path]) -> float | None:
    """Median time from a file to its detections, one image at a time; None without images."""
    times: list[float] = []
    started = time.perf_counter()
    for number, path in enumerate(images[: UNTIMED + TIMED]):
        begun = time.perf_counter()
        detect(path)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= min(UNTIMED, len(images) - 1):
            times.append(time.perf_counter() - begun)
        if times and time.perf_counter() - started > TIMED_SECONDS:
            break
    return statistics.median(times) if times else None


def parameters(model: torch.nn.Module) -> float:
    """Number of parameters, trained or frozen."""
    return float(sum(p.numel() for p in model.parameters()))
