"""Convert :class:`Detections` to COCO's result format and file, and format metrics as Detectron2's tables."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from gn_det.errors import DataError
from gn_det.files import StrPath, atomic_write, json_bytes
from gn_det.structures import AnyDetections, crop_mask, encode_crop, to_numpy
from gn_det.text import one_line

if TYPE_CHECKING:
    from torch import Tensor

#: Name of the results file, as Detectron2 writes it.
RESULTS_FILE = "coco_instances_results.json"
#: Metrics of one task, in Detectron2's order.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def detections_to_coco(image_id: Any, det: AnyDetections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return one result entry per detection.

    Args:
        image_id: id of the image in the COCO json.
        det: detections at the size of the original image.
        category_ids: json category id of each contiguous class index.

    Returns:
        ``{"image_id", "category_id", "bbox": XYWH, "score"}`` and, with masks, ``"segmentation"``: compressed RLE with
        counts as text.

    Raises:
        DataError: a class index has no category id.
    """
    n = len(det)
    if n == 0:
        return []
    boxes = np.array(to_numpy(det.boxes), dtype=np.float32)
    boxes[:, 2:] -= boxes[:, :2]
    scores, classes = det.scores.tolist(), det.classes.tolist()
    if max(classes) >= len(category_ids) or min(classes) < 0:
        raise DataError(
            f"image {image_id!r}: the model predicts class index {max(classes)} but the data set has "
            f"{len(category_ids)} categories; set MODEL.ROI_HEADS.NUM_CLASSES {len(category_ids)} or use its own json"
        )
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": int(category_ids[c]), "bbox": box, "score": score}
        for c, box, score in zip(classes, boxes.tolist(), scores)
    ]
    if det.masks is not None:
        for result, rle in zip(results, encode_masks(det.masks)):
            result["segmentation"] = rle
    return results


def encode_masks(masks: Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Encode (N, H, W) masks of any dtype (nonzero is inside) as compressed RLE: ``{"size": [H, W], "counts": text}``.

    The text equals that of pycocotools' encoder. Most of the work is the conversion to column order, which is limited
    to the bounding box of a mask.
    """
    bitmaps = (to_numpy(mask).astype(bool, copy=False) for mask in masks)
    return [encode_crop(crop_mask(bitmap), *bitmap.shape) for bitmap in bitmaps]


def merge_results(parts: Iterable[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge results in rank order; an image seen by two ranks (padding of the last batch) counts once."""
    owner: dict[Any, int] = {}
    merged: list[dict[str, Any]] = []
    for rank, part in enumerate(parts):
        merged.extend(r for r in part if owner.setdefault(r["image_id"], rank) == rank)
    return merged


def write_results(results: Sequence[dict[str, Any]], output_dir: StrPath) -> str:
    """Write ``coco_instances_results.json`` atomically and return its path.

    Raises:
        WriteError: the folder cannot be written (no permission, disk full); an existing file is kept.
    """
    path = os.path.join(os.fspath(output_dir), RESULTS_FILE)
    atomic_write(path, json_bytes(list(results)))
    return path


def format_results(results: Mapping[str, Mapping[str, float]]) -> str:
    """Format a summary and a per-category table per task, then three ``copypaste:`` lines, like Detectron2."""
    blocks, lines = [], []
    for task, metrics in results.items():
        overall = {k: v for k, v in metrics.items() if "-" not in k}
        look = {"tablefmt": "pipe", "floatfmt": ".3f"}
        table = tabulate([list(overall.values())], list(overall), **look, stralign="center", numalign="center")
        blocks.append(f"Evaluation results for {task}:\n{table}")
        categories = [(one_line(k.removeprefix("AP-")), v) for k, v in metrics.items() if k.startswith("AP-")]
        if categories:
            columns = min(6, 2 * len(categories))  # up to three pairs a row
            flat = list(itertools.chain.from_iterable(categories))
            rows = itertools.zip_longest(*[flat[i::columns] for i in range(columns)])
            table = tabulate(rows, ["category", "AP"] * (columns // 2), **look, numalign="left")
            blocks.append(f"Per-category {task} AP:\n{table}")
        values = ",".join(f"{v:.4f}" for v in overall.values())
        lines += [f"copypaste: {line}" for line in (f"Task: {task}", ",".join(overall), values)]
    return "\n".join([*blocks, *lines])
