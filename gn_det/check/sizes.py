"""Object sizes as the network sees them, against the anchors of a config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gn_det.check.audit import Survey, Training

#: Borders between the bars of the histogram, in pixels at training size.
EDGES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: From this share of objects below half the smallest anchor on, the report says so.
_MANY_SMALL = 0.25
#: Objects whose fit is computed at once.
_BLOCK = 65536


@dataclass(frozen=True)
class SizeTable:
    """Histogram of sqrt(box area) at training size.

    Attributes:
        edges: borders between the bars, pixels.
        counts: len(edges) + 1 bars.
        anchors: anchor sizes of the config, pixels.
        short_side: the shorter side that images are resized to for this table, 0 for no resize.
        max_size: their longest side.
        fit: share of objects whose box shape has at least IoU 0.7 / 0.5 with a centred anchor.
        small: share of objects smaller than half the smallest anchor.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    anchors: tuple[float, ...]
    short_side: int
    max_size: int
    fit: tuple[float, float]
    small: float

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def rule(self) -> str:
        """How the sizes were taken, in words."""
        if self.short_side == 0:
            return "sqrt of the box area in pixels; images are not resized"
        return (
            f"sqrt of the box area in pixels, images resized to a shorter side of {self.short_side}, "
            f"at most {self.max_size}"
        )

    @property
    def many_small(self) -> bool:
        return self.total > 0 and self.small > _MANY_SMALL

    def labels(self) -> list[str]:
        """Names of the bars."""
        inner = [f"{a}-{b}" for a, b in zip(self.edges, self.edges[1:])]
        return [f"< {self.edges[0]}", *inner, f">= {self.edges[-1]}"]


def size_table(surveys: Sequence[Survey], training: Training, cfg: Any) -> SizeTable:
    """The histogram over all objects of some sets."""
    side = sorted(training.short_sides)[len(training.short_sides) // 2]
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        side = round(sum(training.short_sides) / len(training.short_sides))
    widths, heights = (np.concatenate(c) for c in zip(*(_at_training_size(s, training, side) for s in surveys)))
    sizes = np.sqrt(widths * heights)
    anchors = _flat(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    shapes = _shapes(anchors, _flat(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS))
    best = _best_fit(widths, heights, shapes)
    counts = np.bincount(np.searchsorted(EDGES, sizes, side="right"), minlength=len(EDGES) + 1)
    total = max(len(sizes), 1)
    return SizeTable(
        edges=EDGES,
        counts=tuple(int(c) for c in counts),
        anchors=tuple(anchors),
        short_side=side,
        max_size=training.max_size,
        fit=(float((best >= 0.7).sum() / total), float((best >= 0.5).sum() / total)),
        small=float((sizes < min(anchors) / 2).sum() / total) if anchors else 0.0,
    )


def _at_training_size(survey: Survey, training: Training, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights of all objects of a set, in pixels of the resized images."""
    scales = np.array([training.scale(i["width"], i["height"], side) for i in survey.images]).reshape(-1, 2)
    index = np.array(survey.objects.images, dtype=np.int64)
    widths = np.array(survey.objects.widths, dtype=np.float64) * scales[index, 0]
    heights = np.array(survey.objects.heights, dtype=np.float64) * scales[index, 1]
    return widths, heights


def _shapes(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """(A, 2) widths and heights of the anchors; a ratio is height / width."""
    shapes = [(s / math.sqrt(r), s * math.sqrt(r)) for s in sizes for r in ratios]
    return np.array(shapes, dtype=np.float64).reshape(-1, 2)


def _best_fit(widths: np.ndarray, heights: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """(N,) IoU of each box with the best anchor, were both centred on one point."""
    best = np.zeros(len(widths))
    for start in range(0, len(widths), _BLOCK) if len(shapes) else ():
        part = slice(start, start + _BLOCK)
        w, h = widths[part, None], heights[part, None]
        inter = np.minimum(w, shapes[:, 0]) * np.minimum(h, shapes[:, 1])
        best[part] = (inter / (w * h + shapes.prod(axis=1) - inter)).max(axis=1)
    return best


def _flat(values: Any) -> list[float]:
    """Different numbers of a nested list, ascending."""
    found: set[float] = set()
    for value in values:
        found |= set(_flat(value)) if isinstance(value, (list, tuple)) else {float(value)}
    return sorted(found)
