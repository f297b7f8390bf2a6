"""COCO average precision of boxes and masks, with Detectron2's metric names and derivation.

``faster-coco-eval`` does the matching. Its numbers equal pycocotools' (tests compare them to the last digit).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gn_det.data.coco import CocoDataset
from gn_det.data.coco_json import collector_paused
from gn_det.errors import DataError
from gn_det.evaluation import diagnose
from gn_det.evaluation.diagnose import Caps
from gn_det.evaluation.ground_truth import GroundTruth, load_ground_truth
from gn_det.evaluation.results import METRICS, detections_to_coco, write_results
from gn_det.files import StrPath
from gn_det.text import count

__all__ = ["EvalResult", "detections_to_coco", "evaluate_coco", "load_ground_truth"]

log = logging.getLogger(__name__)

#: Categories are scored a few at a time, of about this many detections and pairs of image and category together, which
#: bounds the memory: they do not depend on each other.
_PART = 30_000
#: Results converted at once.
_BLOCK = 4096


class EvalResult(dict[str, dict[str, float]]):
    """``{"bbox": {"AP": percent, ...}, "segm": {...}}`` with explanations.

    Attributes:
        reasons: why an AP is 0 or undefined; empty if nothing needs explaining.
        warnings: repairs of the ground truth.
    """

    reasons: list[str]
    warnings: list[str]


@collector_paused()  # which would scan all entries again and again, for a third of the time
def evaluate_coco(
    ground_truth: StrPath | Mapping[str, Any] | CocoDataset | GroundTruth,
    results: Sequence[dict[str, Any]],
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    *,
    iou_types: Sequence[str] = ("bbox", "segm"),
    output_dir: StrPath | None = None,
    max_dets: int | None = None,
    detections_per_image: int | None = None,
    proposals: int | None = None,
) -> EvalResult:
    """Compute the average precision of ``results`` on a COCO json.

    Args:
        ground_truth: path of the COCO json, its content, or a loaded set.
        results: entries in COCO's result format (:func:`detections_to_coco`); not modified.
        class_names: names for the per-category AP, like Detectron2's ``thing_classes``; None: those of the json. As in
            Detectron2, a single class has no per-category AP.
        category_ids: json category id of each name; None: the ids of the json, ascending.
        iou_types: ``"bbox"`` and/or ``"segm"``; masks are skipped if no result has one.
        output_dir: folder for ``coco_instances_results.json``; None writes nothing.
        max_dets: how many detections per class and image count (``TEST.MAX_DETS``, COCOeval's maxDets); None: 100. The
            metric names do not change.
        detections_per_image: most detections per image of all classes (``TEST.DETECTIONS_PER_IMAGE``); used only to
            explain the cost of the limits.
        proposals: most boxes that the model classifies (``MODEL.RPN.POST_NMS_TOPK_TEST``); likewise.

    Returns:
        Percentages in the order AP, AP50, AP75, APs, APm, APl, AP-<name> ...; nan if undefined. Empty if the json has
        no ``annotations`` (a test set).

    Raises:
        DataError: the json is unusable, or a result names an image that is not in it.
    """
    gt = load_ground_truth(ground_truth)
    for sentence in gt.warnings:
        log.warning(sentence)
    _check_results(gt, results)
    out = EvalResult()
    out.reasons, out.warnings = [], list(gt.warnings)
    if output_dir is not None:
        log.info("Results written to %s", write_results(results, output_dir))
    if not gt.has_annotations:
        out.reasons.append(f"{gt.source} has no annotations: results are written but no AP can be computed.")
        return out
    names, ids = _names_and_ids(gt, class_names, category_ids)
    for task in _tasks(iou_types, results):
        if len(results) == 0:
            out[task] = {metric: math.nan for metric in METRICS}
        else:
            out[task] = _derive(_precision(gt, results, task, max_dets), gt, names, ids)
    caps = Caps(100 if max_dets is None else int(max_dets), detections_per_image, proposals)
    out.reasons.extend(diagnose.capped(gt, caps))
    out.reasons.extend(diagnose.explain(out, gt, results, ids))
    for sentence in out.reasons:
        log.warning(sentence)
    return out


def _tasks(iou_types: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    unknown = set(iou_types) - {"bbox", "segm"}
    if unknown:
        raise ValueError(f"iou_types: {sorted(unknown)} not in ('bbox', 'segm')")
    tasks = sorted(set(iou_types))
    if results and "segm" in tasks:
        with_mask = sum("segmentation" in r for r in results)
        if with_mask == 0:
            tasks.remove("segm")
        elif with_mask < len(results):
            bad = next(r for r in results if "segmentation" not in r)
            raise DataError(f"results: one on image {bad['image_id']!r} has no segmentation, but others have one")
    return tasks


def _names_and_ids(
    gt: GroundTruth, class_names: Sequence[str] | None, category_ids: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    ids = gt.category_ids if category_ids is None else [int(i) for i in category_ids]
    if class_names is None:
        known = {c["id"]: str(c["name"]) for c in gt.categories}
        return [known.get(i, str(i)) for i in ids], ids
    if len(class_names) != len(ids):
        raise DataError(
            f"{gt.source}: {len(class_names)} class names for {len(ids)} category ids; "
            "evaluate with the json (or checkpoint) that the model was trained with"
        )
    return list(class_names), ids


def _check_results(gt: GroundTruth, results: Sequence[Mapping[str, Any]]) -> None:
    known = set(gt.image_ids)
    unknown = {r["image_id"] for r in results} - known
    if unknown:
        raise DataError(
            f"{gt.source}: results have {count(len(unknown), 'image id')} that are not in this json, e.g. "
            f"{next(iter(unknown))!r} (it has e.g. {next(iter(known))!r}); evaluate on the json that was predicted on"
        )


def _precision(gt: GroundTruth, results: Sequence[dict[str, Any]], task: str, max_dets: int | None) -> np.ndarray:
    """Return precision (IoU threshold 10, recall 101, category, area range 4, max dets 1); -1 if undefined."""
    found = defaultdict(list)
    for index, result in enumerate(results):
        found[result["category_id"]].append(index)
    parts: list[list[Any]] = [[]]
    size = 0
    for category in gt.categories:
        if parts[-1] and size > _PART:
            parts.append([])
            size = 0
        parts[-1].append(category)
        size += len(gt.images) + len(found[category["id"]])
    precisions = []
    for categories in parts:
        entries = (results[index] for category in categories for index in found[category["id"]])
        precisions.append(_precision_of(gt, categories, entries, task, max_dets))
    return np.concatenate(precisions, axis=2)


def _precision_of(
    gt: GroundTruth, categories: Sequence[Any], results: Iterable[Any], task: str, max_dets: int | None
) -> np.ndarray:
    """Return the precision of some categories, of which ``results`` are all the results."""
    from faster_coco_eval import COCO, COCOeval_faster

    ids = {category["id"] for category in categories}
    # Shallow copies, because the evaluator writes flags and run-length objects into the entries.
    annotations = [
        dict(a) for a in gt.annotations if a["category_id"] in ids and (task == "bbox" or "segmentation" in a)
    ]
    entries = _entries(results, task, annotations)
    number = {image_id: image_id for image_id in gt.image_ids}
    # The evaluator stores ids as doubles, so replace text and large numbers by a running index.
    if not all(type(i) is int and abs(i) < 2**53 for i in number):
        number = {image_id: n for n, image_id in enumerate(sorted(number, key=lambda i: (str(type(i)), i)), 1)}
        for entry in (*entries, *annotations):
            entry["image_id"] = number[entry["image_id"]]
    images = [{"id": number[i["id"]], "height": i.get("height"), "width": i.get("width")} for i in gt.images]
    truth, found = (
        COCO({"images": images, "categories": categories, "annotations": a}, print_function=_silent)
        for a in (annotations, entries)
    )
    evaluator = COCOeval_faster(truth, found, task, print_function=_silent, extra_calc=False)
    # A single number is enough: COCOeval reads only the largest.
    evaluator.params.maxDets = [100 if max_dets is None else int(max_dets)]
    # By default faster-coco-eval 1.8 computes each image and category in a thread, which costs more than it saves.
    evaluator.rle_iou_max_workers = 1
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])


def _entries(
    results: Iterable[Mapping[str, Any]], task: str, annotations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the evaluator's detections, with size ranges by the area of the box or of the mask.

    A detection whose category has no object in its image cannot match, so only its area matters. Giving it a mask of
    one pixel avoids most of the run-length work on typical results.
    """
    from faster_coco_eval.core import mask as fast_mask

    present = {(a["image_id"], a["category_id"]) for a in annotations}
    stand_in = {"size": [1, 1], "counts": "1"}
    remaining, number, entries = iter(results), itertools.count(1), []
    while some := list(itertools.islice(remaining, _BLOCK)):
        if task == "bbox":
            areas = [r["bbox"][2] * r["bbox"][3] for r in some]
        else:
            areas = fast_mask.area([r["segmentation"] for r in some]).tolist()
        for r, area in zip(some, areas):
            image, category = r["image_id"], r["category_id"]
            entry = {"id": next(number), "image_id": image, "category_id": category, "score": r["score"], "area": area}
            if task == "bbox":
                entry["bbox"] = r["bbox"]
            else:
                entry["segmentation"] = r["segmentation"] if (image, category) in present else stand_in
            entry["iscrowd"] = 0
            entries.append(entry)
    return entries


def _silent(*_: object) -> None:
    """Print function for the evaluator that suppresses its progress lines."""


def _mean(values: np.ndarray) -> float:
    """Return the mean of the defined entries in percent, nan without any."""
    defined = values[values > -1]
    return float(np.mean(defined) * 100) if defined.size else math.nan


def _derive(precision: np.ndarray, gt: GroundTruth, names: Sequence[str], ids: Sequence[int]) -> dict[str, float]:
    at = precision[..., -1]
    values = (at[:, :, :, 0], at[0, :, :, 0], at[5, :, :, 0], at[:, :, :, 1], at[:, :, :, 2], at[:, :, :, 3])
    metrics = dict(zip(METRICS, map(_mean, values)))
    if len(names) > 1:
        row = {category_id: k for k, category_id in enumerate(gt.category_ids)}
        for name, i in zip(names, ids):
            metrics[f"AP-{name}"] = _mean(at[:, :, row[i], 0]) if i in row else math.nan
    return metrics
