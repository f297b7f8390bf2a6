"""Ground truth of a COCO json, made safe for the evaluators.

COCO's evaluators trust their input: annotation id 0 counts as "not matched", a repeated id hides another object, a
missing ``area`` or ``iscrowd`` is a KeyError and a non-finite polygon vertex ends the process inside the mask API.
:func:`load_ground_truth` therefore builds a private copy with annotations renumbered from 1 and gaps filled; what it
changed is kept in :attr:`GroundTruth.warnings`. On a sound json the copy evaluates to the same numbers.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gn_det.data.coco_file import read_json
from gn_det.errors import DataError

#: A polygon vertex farther out than this makes the mask API allocate without bound.
MAX_COORDINATE = 1e5


@dataclass
class GroundTruth:
    """A checked COCO data set.

    Attributes:
        source: path (or a short name) for messages.
        images: ``{"id", "height", "width", ...}``, ids unique.
        categories: ``{"id", "name"}`` sorted by id.
        annotations: COCO annotations with ``id`` 1..N in file order, ``bbox`` (XYWH), ``area``, ``iscrowd``; a
            usable ``segmentation`` or none at all.
        warnings: one sentence for each kind of repair.
        has_annotations: False for a test json, which has no ``annotations`` key.
    """

    source: str
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    has_annotations: bool = True

    @property
    def image_ids(self) -> list[Any]:
        """Image ids in file order."""
        return [image["id"] for image in self.images]

    @property
    def category_ids(self) -> list[int]:
        """Category ids, ascending."""
        return [category["id"] for category in self.categories]


def load_ground_truth(source: str | os.PathLike[str] | Mapping[str, Any] | GroundTruth) -> GroundTruth:
    """Read and check a COCO json; the file or dict given is never changed.

    Args:
        source: path of a COCO json, its content as a dict, or a :class:`GroundTruth` (returned as it is).

    Raises:
        DataError: the file is missing or no json, or has no images or categories.
    """
    if isinstance(source, GroundTruth):
        return source
    name, data = ("ground truth", source) if isinstance(source, Mapping) else _read(os.fspath(source))
    for key in ("images", "categories"):
        if not isinstance(data.get(key), Sequence) or len(data[key]) == 0:
            raise DataError(f"{name}: no '{key}' in this json; COCO evaluation needs a non-empty list of them")
    repairs = _Repairs()
    images = _unique_by_id(data["images"], "image", name, repairs)
    categories = sorted(_unique_by_id(data["categories"], "category", name, repairs), key=lambda c: c["id"])
    for category in categories:
        category.setdefault("name", str(category["id"]))
    raw = data.get("annotations")
    annotations = _check_annotations(raw or [], images, categories, repairs)
    return GroundTruth(name, images, categories, annotations, repairs.sentences(name), raw is not None)


def _read(path: str) -> tuple[str, Mapping[str, Any]]:
    data = read_json(path, advice="give the COCO json of the set to evaluate on")
    if not isinstance(data, Mapping):
        raise DataError(f"{path}: not a COCO json (expected an object with 'images', 'categories', 'annotations')")
    return path, data


class _Repairs:
    """Counts what was repaired and remembers the first ids of each kind."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.examples: dict[str, list[Any]] = {}

    def add(self, kind: str, example: Any) -> None:
        self.count[kind] += 1
        if self.count[kind] <= 3:
            self.examples.setdefault(kind, []).append(example)

    def sentences(self, name: str) -> list[str]:
        out = []
        for kind, n in self.count.items():
            shown = ", ".join(repr(e) for e in self.examples[kind]) + (", ..." if n > 3 else "")
            out.append(f"{name}: {n} {kind} ({shown})")
        return out


def _unique_by_id(items: Sequence[Any], what: str, name: str, repairs: _Repairs) -> list[dict[str, Any]]:
    seen: dict[Any, dict[str, Any]] = {}
    for item in items:
        if not isinstance(item, Mapping) or "id" not in item:
            raise DataError(f"{name}: an entry of the {what} list has no 'id'; give every {what} a unique id")
        if item["id"] in seen:
            repairs.add(f"{what} entries repeat an id; the last one counts", item["id"])
        seen[item["id"]] = dict(item)
    return list(seen.values())


def _check_annotations(
    raw: Sequence[Any], images: list[dict[str, Any]], categories: list[dict[str, Any]], repairs: _Repairs
) -> list[dict[str, Any]]:
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in images}
    known = {category["id"] for category in categories}
    seen: set[Any] = set()
    out: list[dict[str, Any]] = []
    for ann in raw:
        ann_id = ann.get("id")
        if ann.get("image_id") not in sizes:
            repairs.add("annotations are ignored because their image_id is not among the images", ann_id)
            continue
        if ann.get("category_id") not in known:
            repairs.add("annotations are ignored because their category_id is not among the categories", ann_id)
            continue
        if ann_id == 0:
            repairs.add("annotations have id 0, which COCO's matching reads as 'not matched'; renumbered in memory", 0)
        elif ann_id in seen:
            repairs.add("annotations repeat an id; renumbered in memory", ann_id)
        seen.add(ann_id)
        checked = _check_annotation(ann, sizes[ann["image_id"]], repairs)
        if checked is not None:
            checked["id"] = len(out) + 1
            out.append(checked)
    return out


def _check_annotation(ann: Mapping[str, Any], size: tuple[Any, Any], repairs: _Repairs) -> dict[str, Any] | None:
    """The annotation with bbox, area and iscrowd present, or None when nothing usable is left of it."""
    out: dict[str, Any] = {
        "image_id": ann["image_id"],
        "category_id": ann["category_id"],
        "iscrowd": int(ann.get("iscrowd") or 0),
    }
    segmentation = _check_segmentation(ann.get("segmentation"), size, ann.get("id"), repairs)
    if segmentation is not None:
        out["segmentation"] = segmentation
    bbox = ann.get("bbox")
    if not _is_box(bbox):
        if segmentation is None:
            repairs.add("annotations are ignored because they have no usable bbox or segmentation", ann.get("id"))
            return None
        repairs.add("annotations have no usable bbox; it is taken from the segmentation", ann.get("id"))
        bbox = _rle_of(segmentation, size)[1]
    out["bbox"] = [float(v) for v in bbox]  # type: ignore[union-attr]
    area = ann.get("area")
    if not isinstance(area, (int, float)) or not math.isfinite(area):
        repairs.add("annotations have no 'area'; it is computed from the segmentation, else the bbox", ann.get("id"))
        area = _rle_of(segmentation, size)[0] if segmentation is not None else out["bbox"][2] * out["bbox"][3]
    out["area"] = area
    return out


def _is_box(bbox: Any) -> bool:
    return (
        isinstance(bbox, (list, tuple))
        and len(bbox) == 4
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in bbox)
    )


def _check_segmentation(segmentation: Any, size: tuple[Any, Any], ann_id: Any, repairs: _Repairs) -> Any:
    """A segmentation the mask API can take, or None."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        rle_size = list(segmentation.get("size", ()))
        if "counts" not in segmentation or rle_size != [size[0], size[1]]:
            repairs.add("RLE masks are ignored because their size is not [height, width] of the image", ann_id)
            return None
        if isinstance(segmentation["counts"], list):
            counts = np.asarray(segmentation["counts"])
            if counts.dtype.kind not in "iu" or counts.min(initial=0) < 0 or counts.sum() != size[0] * size[1]:
                repairs.add("RLE masks are ignored because their counts do not add up to height x width", ann_id)
                return None
        return dict(segmentation)
    if size[0] is None or size[1] is None:
        repairs.add("polygons are ignored because their image has no height and width in the json", ann_id)
        return None
    pieces = [p for p in segmentation if isinstance(p, (list, tuple)) and len(p) >= 6 and len(p) % 2 == 0]
    if len(pieces) < len(segmentation):
        repairs.add("annotations have polygon pieces of fewer than 3 points, which are left out", ann_id)
    for piece in pieces:
        try:
            # min and max miss a NaN, the sum does not.
            sane = math.isfinite(sum(piece)) and max(max(piece), -min(piece)) < MAX_COORDINATE
        except TypeError:
            sane = False
        if not sane:
            repairs.add("polygons are ignored because a vertex is not a finite, sane number", ann_id)
            return None
    return pieces or None


def _rle_of(segmentation: Any, size: tuple[Any, Any]) -> tuple[float, list[float]]:
    """Area in pixels and XYWH box of a checked segmentation."""
    from pycocotools import mask as coco_mask

    rle = segmentation
    if isinstance(rle, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(rle, size[0], size[1]))
    elif isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, size[0], size[1])
    return float(coco_mask.area(rle)), [float(v) for v in coco_mask.toBbox(rle)]
