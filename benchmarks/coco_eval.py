"""COCO evaluation against pycocotools on a generated COCO-like result set: same numbers, how much faster?

    python benchmarks/coco_eval.py      # 1000 images, 80 classes, about 7 objects and up to 100 detections each
    python benchmarks/coco_eval.py --images 100 --repeats 2
    python benchmarks/coco_eval.py --images 5000 --detections 100 --repeats 1    # COCO's validation set; 15 minutes

Both sides start from the json file on disk and the list of results in memory and end with the metrics; they take turns
in processes of their own, which are copies of this one, so that each has its own peak of memory. Times are CPU seconds.
Writes benchmarks/results/coco_eval.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gn_det.evaluation.coco_eval import evaluate_coco
from gn_det.evaluation.results import METRICS

TARGETS = {"bbox": 6.0, "segm": 4.0}
RESULTS = Path(__file__).parent / "results" / "coco_eval.json"


def blob(rng: np.random.Generator, box: np.ndarray, points: int = 24) -> list[float]:
    """A wobbly closed outline inside an XYWH box, as one polygon."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = 0.5 * (0.8 + 0.2 * np.cos(3 * angle + rng.random() * 6) * rng.random())
    x = box[0] + box[2] * (0.5 + radius * np.cos(angle))
    y = box[1] + box[3] * (0.5 + radius * np.sin(angle))
    return [float(v) for v in np.stack([x, y], 1).reshape(-1).round(2)]


def random_box(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An XYWH box; half of them small, as in COCO."""
    w, h = np.clip(np.exp(rng.normal(3.7, 1.0, 2)), 6, [width - 1, height - 1])
    return np.array([rng.random() * (width - w), rng.random() * (height - h), w, h])


def generate(
    images: int, classes: int, detections: int | None = None, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO json content and results; classes skewed and ids with gaps as in COCO."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    share /= share.sum()
    ids = np.sort(rng.choice(np.arange(1, classes * 9 // 8 + 1), classes, replace=False))
    data: dict[str, Any] = {"images": [], "categories": [{"id": int(i), "name": f"class {i}"} for i in ids]}
    data["annotations"], results = [], []
    for image_id in range(1, images + 1):
        height, width = (480, 640) if rng.random() < 0.7 else (640, 427)
        data["images"].append({"id": image_id * 13, "height": height, "width": width, "file_name": f"{image_id}.jpg"})
        boxes = []
        for _ in range(rng.poisson(7)):
            box, category = random_box(rng, height, width), int(rng.choice(ids, p=share))
            polygon = blob(rng, box)
            rle = coco_mask.frPyObjects([polygon], height, width)
            crowd = rng.random() < 0.01
            segmentation: Any = [polygon]
            if crowd:
                segmentation = {"size": [height, width], "counts": rle[0]["counts"].decode()}
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": image_id * 13,
                    "category_id": category,
                    "bbox": [float(v) for v in box],
                    "area": float(coco_mask.area(rle)[0]),
                    "iscrowd": int(crowd),
                    "segmentation": segmentation,
                }
            )
            boxes.append((box, category))
        for _ in range(int(rng.integers(0, 101)) if detections is None else detections):
            if boxes and rng.random() < 0.3:
                box, category = boxes[rng.integers(len(boxes))]
                box = np.maximum(box + rng.normal(0, 0.06, 4) * [box[2], box[3], box[2], box[3]], [0, 0, 2, 2])
                score = rng.beta(4, 2)
            else:
                box, category, score = random_box(rng, height, width), int(rng.choice(ids, p=share)), rng.beta(1, 6)
            rle = coco_mask.frPyObjects([blob(rng, box)], height, width)[0]
            results.append(
                {
                    "image_id": image_id * 13,
                    "category_id": category,
                    "bbox": [float(v) for v in box],
                    "score": float(score),
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                }
            )
    return data, results


def reference(path: str, results: list[dict[str, Any]], task: str) -> dict[str, float]:
    """The metrics from pycocotools as evaluators call it."""
    entries = [{k: v for k, v in r.items() if k != ("bbox" if task == "segm" else "segmentation")} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(path)
        evaluator = COCOeval(gt, gt.loadRes(entries), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = {name: 100 * v if v >= 0 else math.nan for name, v in zip(METRICS, evaluator.stats.tolist())}
    for k, category in enumerate(sorted(gt.dataset["categories"], key=lambda c: c["id"])):
        p = evaluator.eval["precision"][:, :, k, 0, -1]
        metrics[f"AP-{category['name']}"] = 100 * float(p[p > -1].mean()) if (p > -1).any() else math.nan
    return metrics


def measured(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, MiB beyond those of this process, and the value, of a forked process that calls ``function``."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        gc.collect()
        reset_peak()
        before, start = peak(), time.process_time()
        value = function()
        writer.send((time.process_time() - start, peak() - before, value))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    writer.close()
    result: tuple[float, float, Any] = reader.recv()
    process.join()
    return result


def reset_peak() -> None:
    """Reset the peak memory of this process to its current memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """In percent points; keys, order and nan must be the same."""
    assert list(ours) == list(theirs)
    assert all(math.isnan(ours[k]) == math.isnan(theirs[k]) for k in ours)
    return max(abs(ours[k] - theirs[k]) for k in ours if not math.isnan(ours[k]))


def compare(path: str, results: list[dict[str, Any]], task: str, repeats: int) -> dict[str, Any]:
    evaluate_coco(path, results[:50], iou_types=[task])  # imports and first-call costs
    reference(path, results[:50], task)
    sides: dict[str, Callable[[], Any]] = {
        "gn_det": partial(evaluate_coco, path, results, iou_types=[task]),
        "pycocotools": partial(reference, path, results, task),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    mib: dict[str, list[float]] = {name: [] for name in sides}
    difference, values = 0.0, dict[str, Any]()
    for repeat in range(repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            spent, held, values[name] = measured(sides[name])
            seconds[name].append(spent)
            mib[name].append(held)
        # pycocotools adds 2.2e-16 to tp + fp; nothing else may differ.
        difference = max(difference, largest_difference(values["gn_det"][task], values["pycocotools"]))
        assert difference < 1e-10, f"{task}: numbers differ by {difference}"
        now = ", ".join(f"{name} {seconds[name][-1]:.2f} s, {mib[name][-1]:.0f} MiB" for name in sides)
        print(f"  {task} {repeat + 1}/{repeats}: {now}", flush=True)
    ratios = [b / a for a, b in zip(*seconds.values())]
    memory = statistics.median(a / b for a, b in zip(*mib.values()))
    return {
        "cpu_seconds": seconds,
        "mib": mib,
        "speedup_median": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "memory_ratio": memory,
        "target": TARGETS[task],
        "met": statistics.median(ratios) >= TARGETS[task] and memory <= 1,
        "largest_difference_percent_points": difference,
        "AP": values["gn_det"][task]["AP"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, help="of each image (default: 0 to 100, drawn)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="json to write")
    args = parser.parse_args()
    print(f"generating {args.images} images, {args.classes} classes ...", flush=True)
    data, results = generate(args.images, args.classes, args.detections)
    print(f"{len(data['annotations'])} objects, {len(results)} detections", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "val.json")
        Path(path).write_text(json.dumps(data), encoding="utf-8")
        tasks = {task: compare(path, results, task, args.repeats) for task in TARGETS}
    report = {
        "what": "evaluate_coco against pycocotools, json on disk and results in memory to metrics",
        "images": args.images,
        "classes": args.classes,
        "objects": len(data["annotations"]),
        "detections": len(results),
        "repeats": args.repeats,
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in ("faster-coco-eval", "pycocotools", "numpy")},
        "tasks": tasks,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for task, t in tasks.items():
        print(
            f"{task}: {t['speedup_median']:.1f}x ({t['speedup_min']:.1f} - {t['speedup_max']:.1f}), target "
            f"{t['target']:.0f}x, {t['memory_ratio']:.2f} of the memory: {'met' if t['met'] else 'MISSED'}; "
            f"numbers equal within {t['largest_difference_percent_points']:.0e}"
        )
    return 0 if all(t["met"] for t in tasks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
