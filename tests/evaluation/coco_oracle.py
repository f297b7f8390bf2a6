"""Random COCO sets and what pycocotools says about them: the oracle of the evaluation tests."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def ellipse(height: int, width: int, box: list[float]) -> np.ndarray:
    """(H, W) bool mask of the ellipse inscribed in an XYWH box."""
    x, y, w, h = box
    rows, cols = np.mgrid[:height, :width]
    inside = ((cols + 0.5 - x - w / 2) / (w / 2)) ** 2 + ((rows + 0.5 - y - h / 2) / (h / 2)) ** 2 <= 1
    return np.asarray(inside)


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8), [2]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges]))
    return {"size": list(mask.shape), "counts": [int(c) for c in counts]}


def random_set(
    seed: int, *, images: int = 12, categories: int = 5, gts: int = 6, dets: int = 12
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO json with gaps in its ids, crowds, empty images, polygons and both RLE kinds; results that half fit."""
    rng = np.random.default_rng(seed)
    category_ids = [3 * k + 2 for k in range(categories)]
    data: dict[str, Any] = {
        "images": [
            {"id": 10 + 7 * i, "file_name": f"{i}.png", "height": 120 + i, "width": 150 - i} for i in range(images)
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [],
    }
    results: list[dict[str, Any]] = []
    for number, image in enumerate(data["images"]):
        size = (image["height"], image["width"])
        for _ in range(0 if number % 5 == 4 else gts):  # every fifth image has no object
            box = _random_box(rng, size)
            mask = ellipse(*size, box)
            crowd = rng.random() < 0.15
            kind = rng.integers(3)
            x, y, w, h = box
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            segmentation = [compressed(mask), uncompressed(mask), [corners]][kind]
            category = int(rng.choice(category_ids[:-1]))  # the last category has no ground truth
            data["annotations"].append(
                {
                    "id": 5 + 2 * len(data["annotations"]),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": segmentation,
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                jittered = [max(v + rng.normal(0, 2), 1.0) for v in box]
                results.append(_result(rng, image["id"], category, jittered, size))
        for _ in range(dets if number % 3 else 0):
            category = int(rng.choice(category_ids))
            results.append(_result(rng, image["id"], category, _random_box(rng, size), size))
    return data, results


def _random_box(rng: np.random.Generator, size: tuple[int, int]) -> list[float]:
    w, h = (float(v) for v in rng.choice([8.0, 20.0, 40.0, 105.0], 2) + rng.random(2))
    return [float(rng.random() * max(size[1] - w, 1)), float(rng.random() * max(size[0] - h, 1)), w, h]


def _result(
    rng: np.random.Generator, image_id: int, category: int, box: list[float], size: tuple[int, int]
) -> dict[str, Any]:
    # Scores of two digits make ties, whose order must be pycocotools' too.
    score = round(float(rng.random()), 2)
    mask = compressed(ellipse(*size, box))
    return {"image_id": image_id, "category_id": category, "bbox": box, "score": score, "segmentation": mask}


def oracle(
    data: dict[str, Any], results: list[dict[str, Any]], task: str, max_dets: int = 100, *, exact: bool = True
) -> dict[str, float]:
    """Percentages from pycocotools, named as Detectron2 names them.

    Args:
        exact: pycocotools divides by ``tp + fp + 2.2e-16``, which is felt only where tp + fp = 1 (0.9999999999999998
            instead of 1); Detectron2's and our compiled evaluators divide by tp + fp. True takes that out.
    """
    results = copy.deepcopy(results)
    if task == "segm":
        for r in results:
            del r["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(data)
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(results), task)
        evaluator.params.maxDets = [1, 10, max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
    p = evaluator.eval["precision"][..., sorted(evaluator.params.maxDets).index(max_dets)]
    if exact:
        p[p == 1 / (1 + np.spacing(1))] = 1.0

    def percent(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean() * 100) if values.size else math.nan

    out = {"AP": percent(p[..., 0]), "AP50": percent(p[0, ..., 0]), "AP75": percent(p[5, ..., 0])}
    out |= {name: percent(p[..., k]) for k, name in enumerate(("APs", "APm", "APl"), 1)}
    categories = sorted(data["categories"], key=lambda c: c["id"])
    return out | {f"AP-{c['name']}": percent(p[:, :, k, 0]) for k, c in enumerate(categories)}
