"""Break an AP down: matches, confidence intervals, thresholds, confusions and likely label errors.

Matching is COCO's. With every image counted once, the APs equal those of :func:`evaluate_coco`.

Shape letters: T IoU thresholds, D detections, G objects, N images, R resamples, S size ranges.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gn_det.evaluation.ground_truth import GroundTruth

IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
#: (S, 2) ranges of areas: all, then those of SIZES.
_SPANS = np.array([(0.0, 1e10), *SIZES.values()])
#: Resamples of the images for an interval, and the fewest images for which an interval is given.
_RESAMPLES, _LEAST_IMAGES = 200, 5
#: Largest array of resamples x detections (elements), which bounds the memory.
_CELLS = 1 << 20
#: Score bins for the calibration.
_BINS = 10
#: A false detection with at least this score hints at a wrong label.
_SURE = 0.8

Interval = tuple[float, float, float]


@dataclass
class Matches:
    """All detections of one class, by descending score."""

    scores: np.ndarray  # (D,) scores
    images: np.ndarray  # (D,) image index
    hits: np.ndarray  # (T, D) bool: matched with an object
    ignored: np.ndarray  # (T, D) bool: matched with a crowd, or outside the size range
    objects: np.ndarray  # (N,) number of counted objects per image


@dataclass
class ClassAnalysis:
    """Results of one class."""

    name: str
    objects: int
    detections: int
    ap: Interval  # percent with the ends of its 95 % interval; nan without objects
    ap50: Interval  # likewise
    threshold: float  # score with the best F1 at IoU 0.5; nan without a hit
    f1: float
    precision: float  # at that score
    recall: float  # at that score
    curve: np.ndarray  # (P, 2) recall and precision at IoU 0.5


@dataclass
class ImageErrors:
    """Missed objects and false detections of one image, for detections above their thresholds."""

    index: int
    missed: int
    false: int
    objects: int


@dataclass
class Doubt:
    """A label that is probably wrong: ``kind`` is "missing" or "class"; ``box`` is XYWH."""

    kind: str
    index: int
    box: list[float]
    score: float
    found: str
    labeled: str = ""


@dataclass
class Analysis:
    """Analysis of one task."""

    task: str  # "bbox" or "segm"
    images: int
    ap: Interval  # mean over the classes with its interval
    ap50: Interval  # likewise
    classes: list[ClassAnalysis]
    sizes: dict[str, tuple[Interval, int]]  # AP, interval and number of objects per size range
    confusion: np.ndarray  # (K + 1, K + 1) objects by true (row) and detected (column) class; the last is "none"
    calibration: np.ndarray  # (B, 3) mean score, precision and number of detections per score bin
    worst: list[ImageErrors] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)

    @property
    def thresholds(self) -> dict[str, float]:
        """Map class names to their score of best F1, if defined."""
        return {c.name: c.threshold for c in self.classes if math.isfinite(c.threshold)}


def analyze(
    gt: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    task: str,
    max_dets: int = 100,
) -> Analysis:
    """Analyze ``results`` (COCO's format) of ``task`` "bbox" or "segm"; arguments as in :func:`evaluate_coco`."""
    groups = _groups(gt, results, task, max_dets)
    n = len(gt.images)
    resamples = _RESAMPLES if n >= _LEAST_IMAGES else 0
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / max(n, 1)), resamples)
    weights = np.concatenate([np.ones((1, n)), weights]).astype(np.float32)  # the first row is the full set
    classes, calibrated = [], []
    aps: list[list[np.ndarray]] = [[] for _ in _SPANS]
    objects = np.zeros(len(_SPANS), int)
    for name, category in zip(class_names, category_ids):
        sized = _matches(groups, category, n)
        for k, matches in enumerate(sized):
            aps[k].append(average_precision(matches, weights))
            objects[k] += int(matches.objects.sum())
        whole = sized[0]
        classes.append(_class(name, whole, aps[0][-1]))
        calibrated.append(np.stack([whole.scores, whole.hits[0]], 1)[~whole.ignored[0]])
    mean, *means = map(_mean, aps)
    sizes = {name: (_interval(m.mean(0)), int(count)) for name, m, count in zip(SIZES, means, objects[1:])}
    thresholds = {i: c.threshold if math.isfinite(c.threshold) else 0.5 for i, c in zip(category_ids, classes)}
    out = Analysis(
        task,
        n,
        _interval(mean.mean(0)),
        _interval(mean[0]),
        classes,
        sizes,
        np.zeros((len(class_names) + 1,) * 2, np.int64),
        _calibration(np.concatenate(calibrated) if calibrated else np.zeros((0, 2))),
    )
    _look_at_images(out, groups, thresholds, dict(zip(category_ids, class_names)))
    return out


# ------------------------------------------------------------ matching


@dataclass
class _Image:
    """Objects and detections of one image, all classes.

    ``truth_of`` and ``found_of`` map categories to their indices; ``crowd`` and ``sizes`` (area) are (G,).
    """

    index: int
    truth: Sequence[Mapping[str, Any]]
    iou: np.ndarray  # (D, G)
    categories: list[int]  # (D,) category ids; detections by descending score
    boxes: np.ndarray  # (D, 4) XYWH
    scores: np.ndarray  # (D,)
    areas: np.ndarray  # (D,)

    def __post_init__(self) -> None:
        self.truth_of, self.found_of = _places(a["category_id"] for a in self.truth), _places(self.categories)
        self.crowd = np.array([bool(a["iscrowd"]) for a in self.truth], dtype=bool)
        self.sizes = np.array([a["area"] for a in self.truth], dtype=float)


def _places(categories: Iterable[Any]) -> dict[Any, list[int]]:
    places: dict[Any, list[int]] = defaultdict(list)
    for k, category in enumerate(categories):
        places[category].append(k)
    return places


def _groups(gt: GroundTruth, results: Sequence[Mapping[str, Any]], task: str, max_dets: int) -> list[_Image]:
    key = "bbox" if task == "bbox" else "segmentation"
    annotations = [a for a in gt.annotations if key in a]
    truth, found = (_places(e["image_id"] for e in entries) for entries in (annotations, results))
    out = []
    for index, image in enumerate(gt.images):
        here = [annotations[k] for k in truth.get(image["id"], ())]
        there = _best_of_each_class([results[k] for k in found.get(image["id"], ())], max_dets)
        boxes = np.array([r["bbox"] for r in there], float).reshape(-1, 4)
        if task == "bbox":
            areas = boxes[:, 2] * boxes[:, 3]
            shapes: Any = boxes, np.array([a["bbox"] for a in here], float).reshape(-1, 4)
        else:
            shapes = [[_rle(e[key], image) for e in entries] for entries in (there, here)]
            # pycocotools 2.0.11 fails on more than 255 masks with NumPy 2.
            areas = np.array([coco_mask.area(rle) for rle in shapes[0]], dtype=float)
        iou = np.asarray(coco_mask.iou(*shapes, [int(a["iscrowd"]) for a in here])).reshape(len(there), len(here))
        categories, scores = [r["category_id"] for r in there], np.array([r["score"] for r in there], float)
        out.append(_Image(index, here, iou, categories, boxes, scores, areas))
    return out


def _best_of_each_class(found: list[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return the detections of an image by descending score, at most ``most`` per class."""
    kept: list[Mapping[str, Any]] = []
    seen: Counter[Any] = Counter()
    for result in sorted(found, key=lambda r: -r["score"]):
        seen[result["category_id"]] += 1
        if seen[result["category_id"]] <= most:
            kept.append(result)
    return kept


def _rle(segmentation: Any, image: Mapping[str, Any]) -> Any:
    if not isinstance(segmentation, list):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, image["height"], image["width"]))


def _matches(groups: Sequence[_Image], category: int, images: int) -> list[Matches]:
    """Match one class with COCO's greedy algorithm, within each range of ``_SPANS``."""
    found = [(group, rows) for group in groups if (rows := group.found_of.get(category))]
    scores = np.array([group.scores[k] for group, rows in found for k in rows], dtype=float)
    where = np.array([group.index for group, rows in found for _ in rows], dtype=int)
    areas = np.array([group.areas[k] for group, rows in found for k in rows], dtype=float)
    hits = np.zeros((len(_SPANS), len(IOUS), len(scores)), bool)
    ignored = np.zeros_like(hits)
    objects = np.zeros((len(_SPANS), images), np.float32)
    last = 0
    for group in groups:
        columns, rows = group.truth_of.get(category), group.found_of.get(category, [])
        first, last = last, last + len(rows)
        if not columns:
            continue
        crowd, sizes = group.crowd[columns], group.sizes[columns]
        skip = crowd | (sizes < _SPANS[:, :1]) | (sizes > _SPANS[:, 1:])
        objects[:, group.index] = (~skip).sum(1)
        iou = group.iou[rows][:, columns]
        if iou.max(initial=0.0) < IOUS[0]:
            continue
        for k, order in enumerate(np.argsort(skip, kind="mergesort")):  # those that count first
            match = _greedy(iou[:, order], skip[k, order], crowd[order])
            hits[k, :, first:last], ignored[k, :, first:last] = match
    outside = (areas < _SPANS[:, :1]) | (areas > _SPANS[:, 1:])
    ignored |= outside[:, None] & ~hits
    hits &= ~ignored
    order = np.argsort(-scores, kind="mergesort")
    return [
        Matches(scores[order], where[order], hits[k][:, order], ignored[k][:, order], objects[k])
        for k in range(len(_SPANS))
    ]


def _greedy(iou: np.ndarray, skip: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (T, D) matched and (T, D) ignored for (D, G) IoUs, sorted by descending score, ignored objects last."""
    hit = np.zeros((len(IOUS), len(iou)), bool)
    ignored = np.zeros_like(hit)
    taken = np.zeros((len(IOUS), iou.shape[1]), bool)
    steps = np.arange(len(IOUS))
    for d, row in enumerate(iou):
        if row.max() < IOUS[0]:
            continue
        fits = (row >= np.minimum(IOUS, 1 - 1e-10)[:, None]) & ~(taken & ~crowd)
        counted = fits & ~skip
        # A counted object wins over an ignored one; of equal IoUs, the last wins.
        choice = np.where(counted.any(1, keepdims=True), counted, fits)
        value = np.where(choice, row, -1.0)[:, ::-1]
        best = iou.shape[1] - 1 - value.argmax(1)
        some = choice.any(1)
        hit[some, d] = True
        ignored[some, d] = skip[best[some]]
        taken[steps[some], best[some]] = True
    return hit, ignored


# ------------------------------------------------------------ numbers


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return (T, R) AP (0 to 1) with image i counted ``weights[r, i]`` times; nan if no object counts."""
    step = max(_CELLS // max(len(matches.scores), 1), 1)
    parts = [weights[start : start + step] for start in range(0, len(weights), step)]
    return np.concatenate([_average_precision(matches, part) for part in parts], 1)


def _average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    out = np.full((len(IOUS), len(weights)), np.nan)
    total = weights @ matches.objects
    some = total > 0
    weights, total = weights[some], total[some, None]
    counted = ~matches.ignored
    counts = np.cumsum(weights[:, matches.images] * counted[0], 1, dtype=np.float32)
    for t, hit in enumerate(matches.hits):
        # Precision is highest, and recall rises, at hits; so only they matter.
        at = np.flatnonzero(hit)
        true = np.cumsum(weights[:, matches.images[at]], 1, dtype=np.float32)
        found = counts[:, at]
        # Few detections are ignored at one IoU threshold and counted at another.
        changed = np.flatnonzero(counted[t] != counted[0])
        if len(changed):
            signs = np.where(counted[t, changed], np.float32(1), np.float32(-1))
            steps = np.cumsum(weights[:, matches.images[changed]] * signs, 1, dtype=np.float32)
            found += np.pad(steps, ((0, 0), (1, 0)))[:, np.searchsorted(changed, at, side="right")]
        precision = true / np.maximum(found, np.float32(1e-9))
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        reached = np.searchsorted(_RECALLS, true / total, side="right")
        out[t, some] = (np.diff(reached, axis=1, prepend=0) * precision).sum(1) / len(_RECALLS)
    return out


def _mean(aps: Sequence[np.ndarray]) -> np.ndarray:
    """Return the (T, R) mean over the classes that have objects."""
    stacked = np.stack(aps) if aps else np.full((1, len(IOUS), 1), np.nan)
    known = ~np.isnan(stacked)
    total: np.ndarray = np.where(known, stacked, 0).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(known.any(0), total, np.nan)


def _interval(values: np.ndarray) -> Interval:
    """Return the percentage for the full set, and the central 95 % of the resamples."""
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)
    return float(values[0]) * 100, float(low) * 100, float(high) * 100


def _class(name: str, matches: Matches, ap: np.ndarray) -> ClassAnalysis:
    counts = ~matches.ignored[0]
    hit, scores = matches.hits[0][counts], matches.scores[counts]
    objects = int(matches.objects.sum())
    true, found = np.cumsum(hit), np.arange(1, len(hit) + 1)
    precision, recall = true / np.maximum(found, 1), true / max(objects, 1)
    f1 = 2 * true / np.maximum(found + objects, 1)
    at = (math.nan,) * 4
    if f1.any():
        last_of_equals = np.append(scores[1:] != scores[:-1], True)
        best = int(np.argmax(np.where(last_of_equals, f1, -1.0)))
        at = float(scores[best]), float(f1[best]), float(precision[best]), float(recall[best])
    curve = np.stack([recall, np.maximum.accumulate(precision[::-1])[::-1]], 1)
    return ClassAnalysis(
        name, objects, len(hit), _interval(ap.mean(0)), _interval(ap[0]), *at, curve=curve[:: max(len(curve) // 200, 1)]
    )


def _calibration(found: np.ndarray) -> np.ndarray:
    """Return (B, 3) calibration bins of (D, 2) score and hit."""
    bins = np.minimum((found[:, 0] * _BINS).astype(int), _BINS - 1)
    parts = [found[bins == b] for b in range(_BINS)]
    return np.array([(*part.mean(0), len(part)) for part in parts if len(part)], dtype=float).reshape(-1, 3)


# ------------------------------------------------------------ images


def _look_at_images(
    out: Analysis, groups: Sequence[_Image], thresholds: Mapping[int, float], names: Mapping[int, str]
) -> None:
    """Collect confusions, errors and doubts at IoU 0.5 for the detections above their class's threshold."""
    row_of = {category: k for k, category in enumerate(names)}
    none = len(names)
    for group in groups:
        sure = [k for k, c in enumerate(group.categories) if group.scores[k] >= thresholds.get(c, 2.0)]
        real = [k for k, a in enumerate(group.truth) if not a["iscrowd"] and a["category_id"] in row_of]
        missed, false = list(real), 0
        for d in sure:
            category = group.categories[d]
            free = [k for k in missed if group.iou[d, k] >= 0.5]
            # prefer an object of the same class
            best = max(free, key=lambda k: (group.truth[k]["category_id"] == category, group.iou[d, k]), default=None)
            label = None if best is None else group.truth[best]["category_id"]
            if best is None and (group.iou[d, group.crowd] >= 0.5).any():
                continue
            out.confusion[none if label is None else row_of[label], row_of[category]] += 1
            false += label != category
            if best is not None:
                missed.remove(best)
            meets_none = group.iou[d].max(initial=0.0) < 0.1
            if group.scores[d] >= _SURE and label != category and (best is not None or meets_none):
                kind, labeled = ("missing", "") if label is None else ("class", names[label])
                box, score = group.boxes[d].tolist(), float(group.scores[d])
                out.doubts.append(Doubt(kind, group.index, box, score, names[category], labeled))
        for k in missed:
            out.confusion[row_of[group.truth[k]["category_id"]], none] += 1
        out.worst.append(ImageErrors(group.index, len(missed), false, len(real)))
    out.worst.sort(key=lambda e: (-(e.missed + e.false), e.index))
    out.doubts.sort(key=lambda doubt: -doubt.score)
