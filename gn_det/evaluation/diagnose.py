"""Explain in plain sentences why an AP is 0 or undefined.

COCO's evaluators return -1 or nan without an explanation. There are few causes, and ground truth and results show which
one it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gn_det.evaluation.ground_truth import GroundTruth
from gn_det.structures import box_iou
from gn_det.text import some

_SIZES = {
    "APs": ("below 32²", 0.0, 32.0**2),
    "APm": ("from 32² to 96²", 32.0**2, 96.0**2),
    "APl": ("above 96²", 96.0**2, 1e10),
}

#: Below this AP (percent), the boxes themselves are examined.
_LOW = 1.0
_PROPOSALS = "MODEL.RPN.POST_NMS_TOPK_TEST"
#: Images to examine: enough for a verdict, and fast on a large set.
_SAMPLE = 200


class Caps(NamedTuple):
    """Limits on how many objects of an image can be detected, however good the model is."""

    max_dets: int = 100  # TEST.MAX_DETS, counted detections per class
    detections: int | None = None  # TEST.DETECTIONS_PER_IMAGE, of all classes together; None if unknown
    proposals: int | None = None  # MODEL.RPN.POST_NMS_TOPK_TEST; None if unknown, or if the model has no RPN

    @classmethod
    def of(cls, cfg: Any) -> Caps:
        """Return the limits of ``cfg``; Detectron2's own configs lack TEST.MAX_DETS."""
        has_rpn = cfg.MODEL.META_ARCHITECTURE not in ("RetinaNet", "FCOS")
        proposals = int(cfg.MODEL.RPN.POST_NMS_TOPK_TEST) if has_rpn else None
        return cls(int(cfg.TEST.get("MAX_DETS", 100)), int(cfg.TEST.DETECTIONS_PER_IMAGE), proposals)

    def lost(self, classes: Sequence[int]) -> int:
        """Return how many objects of an image, given by their classes, cannot be detected."""
        counted = sum(min(n, self.max_dets) for n in Counter(classes).values())
        return len(classes) - min(cap for cap in (counted, self.detections, self.proposals) if cap is not None)

    def in_words(self, objects: int) -> str:
        """Return keys and values; includes the proposals only if they are too few for that many objects."""
        parts = [f"TEST.MAX_DETS {self.max_dets}"]
        if self.detections is not None:
            parts.append(f"TEST.DETECTIONS_PER_IMAGE {self.detections}")
        if self.proposals is not None and self.proposals < objects:
            parts.append(f"{_PROPOSALS} {self.proposals}")
        return " and ".join(parts)

    def keys_for(self, objects: int) -> str:
        """Return the keys to set for images with that many objects, with room for false detections."""
        cap = -(-objects // 100) * 100
        keys = f"TEST.MAX_DETS {max(cap, self.max_dets)} TEST.DETECTIONS_PER_IMAGE {max(cap, self.detections or 0)}"
        if self.proposals is not None and self.proposals < objects:
            keys += f" {_PROPOSALS} {max(2 * cap, 1000)}"  # most proposals are duplicates or background
        return keys


def explain(
    metrics: Mapping[str, Mapping[str, float]],
    gt: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> list[str]:
    """Return sentences, most likely cause first; empty if every overall number is defined and none is 0.

    Args:
        metrics: ``{"bbox": {"AP": percent, ...}, ...}``; nan for COCO's -1.
        gt: the ground truth.
        results: entries in COCO's result format.
        category_ids: json category ids of the model's classes.
    """
    reasons: list[str] = []
    objects = [a for a in gt.annotations if not a["iscrowd"]]
    if len(gt.images) == 1:
        reasons.append(f"{gt.source} has a single image, so its AP is almost meaningless; hold out more images.")
    if not objects:
        crowd = " that is not a crowd" if gt.annotations else ""
        return [*reasons, f"AP is undefined (-1, nan): {gt.source} has no ground-truth object{crowd}."]
    if not results:
        return [
            *reasons,
            f"AP is undefined (nan): the model detected nothing in the {len(gt.images)} images of {gt.source}; "
            "train longer, check that MODEL.WEIGHTS was loaded, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST.",
        ]
    reasons += _category_mismatch(gt, objects, results, category_ids)
    reasons += _coverage(objects, results)
    reasons += _undefined(metrics, gt, objects)
    low = [f"{t} AP {m['AP']:.3g}" for t, m in metrics.items() if "AP" in m and m["AP"] < _LOW]
    if low:
        causes = _bad_boxes(objects, results)
        if not causes and not reasons:
            causes = [_untrained(gt, objects, results)]
        reasons += [f"{', '.join(low)}: {c}" for c in causes]
    scores = {r["score"] for r in results}
    if len(scores) == 1 and len(results) > 1:
        reasons.append(
            f"All {len(results)} detections have the same score {next(iter(scores)):.4g}, so their order is arbitrary, "
            "but AP depends on their ranking."
        )
    return reasons


def capped(gt: GroundTruth, caps: Caps) -> list[str]:
    """Return a sentence if ``caps`` keep objects from being detected, however good the model is."""
    classes: dict[Any, list[int]] = defaultdict(list)
    for a in gt.annotations:
        if not a["iscrowd"]:
            classes[a["image_id"]].append(a["category_id"])
    lost = {image: n for image, c in classes.items() if (n := caps.lost(c))}
    if not lost:
        return []
    most = max(len(classes[image]) for image in lost)
    return [
        f"{len(lost)} of {len(gt.images)} images of {gt.source} have more objects (up to {most}) than "
        f"{caps.in_words(most)} let count: {sum(lost.values())} of {sum(map(len, classes.values()))} objects cannot be "
        f"found, which lowers AP even for perfect detections; set {caps.keys_for(most)}."
    ]


def _category_mismatch(
    gt: GroundTruth,
    objects: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> list[str]:
    out = []
    # The model's classes that the json lacks are known to have no objects.
    known = {*gt.category_ids, *category_ids}
    strange = Counter(r["category_id"] for r in results if r["category_id"] not in known)
    if strange:
        out.append(
            f"{sum(strange.values())} of {len(results)} detections have category ids that {gt.source} does not have "
            f"({some(sorted(strange))}; it has {some(gt.category_ids)}) and do not count: the model was trained on "
            "other classes."
        )
    unlearned = sorted({a["category_id"] for a in objects} - set(category_ids))
    if unlearned:
        names = {c["id"]: c["name"] for c in gt.categories}
        out.append(
            f"{gt.source} has objects of categories that the model does not know, and they count as missed: "
            f"{some(names[i] for i in unlearned)}."
        )
    return out


def _coverage(objects: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[str]:
    with_objects, with_results = ({e["image_id"] for e in entries} for entries in (objects, results))
    common = len(with_objects & with_results)
    if common > len(with_objects) / 2:
        return []
    other_ids = f"the ids of the {len(with_results)} images with detections probably do not match"
    return [
        f"Only {common} of the {len(with_objects)} images with objects have any detection, so most objects count as "
        f"missed: {'predict on the whole set, or train longer' if common else other_ids}."
    ]


def _undefined(
    metrics: Mapping[str, Mapping[str, float]], gt: GroundTruth, objects: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a sentence for each size range, and one for the categories, without ground truth."""
    out = []
    if "segm" in metrics and not any("segmentation" in a for a in objects):
        out.append(f"segm AP is undefined (-1, nan): no object of {gt.source} has a usable segmentation.")
    for name, (text, low, high) in _SIZES.items():
        if not any(low <= a["area"] <= high for a in objects):
            out.append(f"{name} is undefined (-1, nan): {gt.source} has no object with an area {text} px.")
    present = {a["category_id"] for a in objects}
    absent = [c["name"] for c in gt.categories if c["id"] not in present]
    if absent:
        out.append(
            f"{len(absent)} of {len(gt.categories)} categories have no object in {gt.source}; their AP is undefined "
            f"(-1, nan) and left out of the mean: {some(absent)}."
        )
    return out


class _Fit(NamedTuple):
    """Share of the examined objects that overlap a detection with IoU >= 0.5."""

    same_class: float
    any_class: float
    detections_as_corners: float  # any class, the detection's four numbers read as x0, y0, x1, y1
    truth_as_corners: float  # any class, the object's four numbers read so, too


def _fit(objects: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> tuple[_Fit, float]:
    """Return the shares, and the highest IoU of a detection with an object of its class."""
    found: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    truth: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for a in objects:
        truth[a["image_id"]].append(a)
    sample = dict.fromkeys(list(truth)[:_SAMPLE])
    for r in results:
        if r["image_id"] in sample:
            found[r["image_id"]].append(r)
    best: list[np.ndarray] = []
    for image_id in sample:
        here, there = truth[image_id], found.get(image_id)
        if not there:
            best.append(np.zeros((4, len(here))))
            continue
        raw_own, raw_det = (np.array([e["bbox"] for e in entries], dtype=np.float64) for entries in (here, there))
        own, det = (np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]) for boxes in (raw_own, raw_det))
        same = np.array([[a["category_id"] == r["category_id"] for r in there] for a in here])
        iou = box_iou(own, det)
        best.append(np.stack([iou * same, iou, box_iou(own, raw_det), box_iou(raw_own, det)]).max(2))
    every = np.concatenate(best, axis=1)
    return _Fit(*(every >= 0.5).mean(1).tolist()), float(every[0].max())


def _bad_boxes(objects: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return recognizable problems with boxes or classes."""
    if any("bbox" not in r for r in results):
        return []
    for what, entries in (("the ground-truth boxes", objects), ("the detected boxes", results)):
        if max(max(e["bbox"]) for e in entries) <= 1.5:
            return [f"{what} are all within 0..1.5 and look normalized; COCO expects pixels."]
    fit, _ = _fit(objects, results)
    for what, share in (("detected", fit.detections_as_corners), ("ground-truth", fit.truth_as_corners)):
        if share > max(0.3, 2 * fit.any_class):
            return [f"the {what} boxes fit when read as [x0, y0, x1, y1]; COCO expects [x, y, width, height]."]
    # A barely trained model predicts random classes with low scores; only confident detections indicate wrong labels.
    sure, _ = _fit(objects, [r for r in results if r["score"] >= 0.5])
    if sure.any_class > max(0.3, 3 * sure.same_class):
        return [
            f"{sure.any_class:.0%} of the objects match a box (IoU >= 0.5) but only {sure.same_class:.0%} with "
            "their own class: class order or category ids of model and json do not match."
        ]
    return []


def _untrained(gt: GroundTruth, objects: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> str:
    score = float(max(r["score"] for r in results))
    hits = "hardly overlap them"
    if all("bbox" in r for r in results):
        hits = f"overlap an object of their class by IoU {_fit(objects, results)[1]:.2f} at best"
    return (
        f"{len(results)} detections (best score {score:.2f}) on {len(objects)} objects of {gt.source} {hits}; train "
        "longer, or check learning rate, weights and input format (INPUT.FORMAT, PIXEL_MEAN)."
    )
