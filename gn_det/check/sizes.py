"""Compare object sizes at training resolution with the anchors of a config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gn_det.check.audit import Training
from gn_det.data.coco import CocoDataset

#: Histogram edges, in pixels at training size.
EDGES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Share of objects below half the smallest anchor from which the report mentions it.
_MANY_SMALL = 0.25
#: Objects per step when computing the fit.
_BLOCK = 65536


@dataclass(frozen=True)
class SizeTable:
    """Histogram of sqrt(box area) at training size."""

    edges: tuple[int, ...]  # histogram edges, pixels
    counts: tuple[int, ...]  # len(edges) + 1 bars
    anchors: tuple[float, ...]  # anchor sizes of the config, pixels
    short_side: int  # shorter side of the resized images, 0 for no resize
    max_size: int  # their longest side
    fit: tuple[float, float]  # share of objects whose box shape has at least IoU 0.7 / 0.5 with a centered anchor
    small: float  # share of objects smaller than half the smallest anchor

    @property
    def rule(self) -> str:
        """Describe how the sizes were measured."""
        resized = f"images resized to a shorter side of {self.short_side}, at most {self.max_size}"
        return f"sqrt of the box area in pixels; {resized if self.short_side else 'images are not resized'}"

    @property
    def many_small(self) -> bool:
        return sum(self.counts) > 0 and self.small > _MANY_SMALL

    def labels(self) -> list[str]:
        """Return the labels of the bars."""
        inner = [f"{a}-{b}" for a, b in zip(self.edges, self.edges[1:])]
        return [f"< {self.edges[0]}", *inner, f">= {self.edges[-1]}"]


def size_table(datasets: Sequence[CocoDataset], training: Training, cfg: Any) -> SizeTable:
    """Compute the histogram over all objects of the sets."""
    side = sorted(training.short_sides)[len(training.short_sides) // 2]
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        side = round(sum(training.short_sides) / len(training.short_sides))
    boxes = np.concatenate([objects_at(dataset, training, side) for dataset in datasets])
    sizes = np.sqrt(boxes.prod(axis=1))
    anchors = flat(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    best = best_fit(boxes, anchor_shapes(anchors, flat(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)))
    counts = np.bincount(np.searchsorted(EDGES, sizes, side="right"), minlength=len(EDGES) + 1)
    total = max(len(sizes), 1)
    return SizeTable(
        edges=EDGES,
        counts=tuple(counts.tolist()),
        anchors=tuple(anchors),
        short_side=side,
        max_size=training.max_size,
        fit=(float((best >= 0.7).sum() / total), float((best >= 0.5).sum() / total)),
        small=float((sizes < min(anchors) / 2).sum() / total) if anchors else 0.0,
    )


def objects_at(dataset: CocoDataset, training: Training, side: int | None = None) -> np.ndarray:
    """Return (M, 2) widths and heights of all objects of a set, in pixels of images resized to the shorter ``side``.

    Without ``side``, that is the largest one of training.
    """
    side = max(training.short_sides) if side is None else side
    scales = np.array([training.scale(width, height, side) for width, height in dataset.sizes.tolist()]).reshape(-1, 2)
    sizes: np.ndarray = dataset.object_sizes.astype(np.float64) * scales[dataset.object_images]
    return sizes


def anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Return (A, 2) widths and heights of the anchors; a ratio is height / width."""
    shapes = [(s / math.sqrt(r), s * math.sqrt(r)) for s in sizes for r in ratios]
    return np.array(shapes, dtype=np.float64).reshape(-1, 2)


def best_fit(boxes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Return (M,) IoU of each box with its best anchor, both centered on the same point."""
    best = np.zeros(len(boxes))
    for start in range(0, len(boxes), _BLOCK) if len(shapes) else ():
        part = boxes[start : start + _BLOCK, None]
        inter = np.minimum(part, shapes).prod(axis=2)
        best[start : start + _BLOCK] = (inter / (part.prod(axis=2) + shapes.prod(axis=1) - inter)).max(axis=1)
    return best


def flat(values: Any) -> list[float]:
    """Return the distinct numbers of a nested list, ascending."""
    found: set[float] = set()
    for value in values:
        found |= set(flat(value)) if isinstance(value, (list, tuple)) else {float(value)}
    return sorted(found)
