"""Compare object sizes at training resolution with the anchors of a config, and propose config keys that fit them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gn_det.check.audit import Training
from gn_det.data.coco import CocoDataset

#: Histogram edges, in pixels at training size, and labels of the bars.
EDGES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
LABELS = (f"< {EDGES[0]}", *(f"{a}-{b}" for a, b in pairwise(EDGES)), f">= {EDGES[-1]}")
#: Objects per step when computing the fit.
_BLOCK = 65536
#: Wanted side of the median object at training size. In COCO at 800 pixels it is about 70, and AP falls steeply below
#: 32, COCO's limit for small objects.
_LEAST_SIDE = 32.0
#: Images are not enlarged beyond this factor, nor beyond this side: interpolation adds no detail, and memory grows.
_MOST_ENLARGED, _MOST_SIDE = 2.0, 1600
#: Anchors are proposed where the objects with IoU 0.5 gain this share.
_LEAST_GAIN = 0.02
#: Detections are limited to this multiple of the most objects in one image.
_ROOM = 1.5


@dataclass(frozen=True)
class SizeTable:
    """Histogram of sqrt(box area) at training size."""

    rule: str  # how the sizes were measured
    counts: tuple[int, ...]  # one for each of LABELS
    anchors: tuple[float, ...]  # anchor sizes of the config, pixels
    fit: tuple[float, float]  # share of objects whose box shape has at least IoU 0.7 / 0.5 with a centered anchor
    small: float  # share of objects smaller than half the smallest anchor


def size_table(datasets: Sequence[CocoDataset], training: Training, cfg: Any) -> SizeTable:
    """Compute the histogram over all objects of the sets."""
    side = sorted(training.short_sides)[len(training.short_sides) // 2]
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        side = round(sum(training.short_sides) / len(training.short_sides))
    boxes = np.concatenate([objects_at(dataset, training, side) for dataset in datasets])
    sizes = np.sqrt(boxes.prod(axis=1))
    anchors = flat(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    best = best_fit(boxes, anchor_shapes(anchors, flat(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)))
    counts = np.bincount(np.searchsorted(EDGES, sizes, side="right"), minlength=len(LABELS))
    total = max(len(sizes), 1)
    return SizeTable(
        rule=f"sqrt of the box area in pixels; images resized to a shorter side of {side}, at most {training.max_size}",
        counts=tuple(counts.tolist()),
        anchors=tuple(anchors),
        fit=(float((best >= 0.7).sum() / total), float((best >= 0.5).sum() / total)),
        small=float((sizes < min(anchors) / 2).sum() / total),
    )


def objects_at(dataset: CocoDataset, training: Training, side: int) -> np.ndarray:
    """Return (M, 2) widths and heights of all objects of a set, in pixels of images resized to the shorter ``side``."""
    scales = training.scales(dataset.sizes, side)
    sizes: np.ndarray = dataset.object_sizes.astype(np.float64) * scales[dataset.object_images]
    return sizes


def anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Return (A, 2) widths and heights of the anchors; a ratio is height / width."""
    shapes = [(s / math.sqrt(r), s * math.sqrt(r)) for s in sizes for r in ratios]
    return np.array(shapes, dtype=np.float64).reshape(-1, 2)


def best_fit(boxes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Return (M,) IoU of each box with its best anchor, both centered on the same point."""
    best = np.zeros(len(boxes))
    for start in range(0, len(boxes), _BLOCK):
        part = boxes[start : start + _BLOCK, None]
        inter = np.minimum(part, shapes).prod(axis=2)
        best[start : start + _BLOCK] = (inter / (part.prod(axis=2) + shapes.prod(axis=1) - inter)).max(axis=1)
    return best


def flat(levels: Sequence[Sequence[float]]) -> list[float]:
    """Return the distinct numbers of all levels, ascending."""
    return sorted({float(value) for level in levels for value in level})


# ------------------------------------------------------------ proposals


def propose(datasets: Sequence[CocoDataset], training: Training, cfg: Any) -> dict[str, Any]:
    """Return keys and values that fit the objects better than those of ``cfg``; empty if its values fit.

    Args:
        datasets: training sets.
        training: how ``cfg`` resizes their images.
    """
    counts = np.concatenate([dataset.object_counts for dataset in datasets])
    if not counts.sum():
        return {}
    boxes = np.concatenate([objects_at(dataset, training, max(training.short_sides)) for dataset in datasets])
    keys = _image_sizes(datasets, boxes, cfg)
    factor = max(keys["INPUT.MIN_SIZE_TRAIN"]) / max(cfg.INPUT.MIN_SIZE_TRAIN) if keys else 1.0
    keys |= _anchors(boxes * factor, cfg)
    most = int(counts.max())
    if most > cfg.TEST.DETECTIONS_PER_IMAGE or most > cfg.TEST.MAX_DETS:
        limit = math.ceil(_ROOM * most / 50) * 50
        keys["TEST.DETECTIONS_PER_IMAGE"] = max(limit, cfg.TEST.DETECTIONS_PER_IMAGE)
        keys["TEST.MAX_DETS"] = max(limit, cfg.TEST.MAX_DETS)
    return keys


def _image_sizes(datasets: Sequence[CocoDataset], boxes: np.ndarray, cfg: Any) -> dict[str, Any]:
    """Propose larger images if the median of the (M, 2) objects is small at training size; empty otherwise."""
    if cfg.INPUT.LSJ.ENABLED:
        return {}  # the scale is drawn from a range that covers both
    median, largest = float(np.median(np.sqrt(boxes.prod(axis=1)))), max(cfg.INPUT.MIN_SIZE_TRAIN)
    original = float(np.median(np.concatenate([d.sizes for d in datasets]).min(axis=1)))
    wanted = min(largest * _LEAST_SIDE / max(median, 1e-6), _MOST_ENLARGED * original, _MOST_SIDE)
    side = math.ceil(wanted / 32) * 32
    if median >= _LEAST_SIDE or side < 1.2 * largest:
        return {}
    factor = side / largest
    longest = math.ceil(cfg.INPUT.MAX_SIZE_TRAIN * factor / 32) * 32
    return {
        "INPUT.MIN_SIZE_TRAIN": tuple(round(s * factor) for s in cfg.INPUT.MIN_SIZE_TRAIN),
        "INPUT.MAX_SIZE_TRAIN": longest,
        "INPUT.MIN_SIZE_TEST": side,
        "INPUT.MAX_SIZE_TEST": longest,
    }


def _anchors(boxes: np.ndarray, cfg: Any) -> dict[str, Any]:
    """Anchor sizes times a power of two, where more of the (M, 2) objects reach IoU 0.5; empty otherwise.

    One factor for all levels: each level keeps its place between the others, and the weights of the RPN fit.
    """
    sizes, ratios = cfg.MODEL.ANCHOR_GENERATOR.SIZES, flat(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)

    def reached(factor: float) -> float:
        shapes = anchor_shapes([factor * size for size in flat(sizes)], ratios)
        return float((best_fit(boxes, shapes) >= 0.5).mean())

    factors = [1.0, 0.5, 2.0, 0.25]  # the first of the best: the config's own, then the nearest
    best = max(factors, key=lambda factor: round(reached(factor), 3))
    if reached(best) < reached(1.0) + _LEAST_GAIN:
        return {}
    scaled = [[best * size for size in level] for level in sizes]
    whole = [[int(size) if size == int(size) else size for size in level] for level in scaled]
    return {"MODEL.ANCHOR_GENERATOR.SIZES": whole}


def as_overrides(keys: dict[str, Any]) -> list[str]:
    """Return lines to append to a command: ``KEY "value"``."""
    texts = {name: f'"{value}"' if isinstance(value, (tuple, list)) else value for name, value in keys.items()}
    return [f"{name} {text}" for name, text in texts.items()]
