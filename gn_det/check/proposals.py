"""Config keys that fit the objects of a dataset: anchors, image sizes, detections of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gn_det.check.audit import Training
from gn_det.check.sizes import anchor_shapes, best_fit, flat, objects_at
from gn_det.data.coco import CocoDataset

#: Wanted side of the median object at training size. In COCO at 800 pixels it is about 70, and AP falls steeply below
#: 32, COCO's limit for small objects.
_LEAST_SIDE = 32.0
#: Images are not enlarged beyond this factor, nor beyond this side: interpolation adds no detail, and memory grows.
_MOST_ENLARGED, _MOST_SIDE = 2.0, 1600
#: Anchors are proposed where the objects with IoU 0.5 gain this share.
_LEAST_GAIN = 0.02
#: Detections are limited to this multiple of the most objects in one image.
_ROOM = 1.5


def propose(datasets: Sequence[CocoDataset], training: Training, cfg: Any) -> dict[str, Any]:
    """Return keys and values that fit the objects better than those of ``cfg``; empty if its values fit.

    Args:
        datasets: training sets.
        training: how ``cfg`` resizes their images.
    """
    counts = np.concatenate([dataset.object_counts for dataset in datasets])
    if not counts.sum():
        return {}
    keys = _image_sizes(datasets, training, cfg)
    factor = max(keys["INPUT.MIN_SIZE_TRAIN"]) / max(cfg.INPUT.MIN_SIZE_TRAIN) if keys else 1.0
    keys |= _anchors(np.concatenate([objects_at(d, training) for d in datasets]) * factor, cfg)
    most = int(counts.max())
    if most > cfg.TEST.DETECTIONS_PER_IMAGE or most > cfg.TEST.MAX_DETS:
        limit = math.ceil(_ROOM * most / 50) * 50
        for name in ("TEST.DETECTIONS_PER_IMAGE", "TEST.MAX_DETS"):
            keys[name] = max(limit, cfg.TEST[name.partition(".")[2]])
    return keys


def _image_sizes(datasets: Sequence[CocoDataset], training: Training, cfg: Any) -> dict[str, Any]:
    """Propose larger images if the median object is small at training size; empty otherwise."""
    if cfg.INPUT.LSJ.ENABLED:
        return {}  # the scale is drawn from a range that covers both
    sides = np.sqrt(np.concatenate([objects_at(d, training) for d in datasets]).prod(axis=1))
    median, largest = float(np.median(sides)), max(cfg.INPUT.MIN_SIZE_TRAIN)
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
    best = max(factors, key=lambda factor: (round(reached(factor), 3), -factors.index(factor)))
    if reached(best) < reached(1.0) + _LEAST_GAIN:
        return {}
    return {"MODEL.ANCHOR_GENERATOR.SIZES": [[_plain(best * size) for size in level] for level in sizes]}


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def as_overrides(keys: dict[str, Any]) -> list[str]:
    """Return lines to append to a command: ``KEY "value"``."""
    return [
        f'{name} "{value}"' if isinstance(value, (tuple, list)) else f"{name} {value}" for name, value in keys.items()
    ]
