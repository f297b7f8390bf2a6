"""One dataset read for ``gn-det check``: everything the loader rejects or repairs, plus problems that it tolerates.

Images and annotations pass through the functions that training uses, with a collector that never stops. What they
accept is checked further: boxes that do not fit their masks, duplicate objects, objects too small to see. It takes one
pass, and no copy of the annotations beyond the compact records.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from gn_det.check.decode import DecodeJob, decode_all
from gn_det.data.annotation_table import AnnotationTable, check_annotations, refuse_corners
from gn_det.data.annotations import AnnotationReader
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, build_dataset
from gn_det.data.coco_json import CocoJson, collector_paused, read_coco_json
from gn_det.data.image import ImageReader
from gn_det.data.image_files import look_at_images
from gn_det.data.problems import KINDS, NOWHERE, FileProblem, Kind, Problem, Problems, Where
from gn_det.data.shapes import prepare
from gn_det.data.transforms import resized_shape
from gn_det.evaluation.diagnose import Caps

#: Findings of one kind that are kept with place and text; further ones are only counted.
KEPT = 1000
#: A box edge may differ from its mask by this many pixels, or by this share of the longer side.
_FIT_PIXELS, _FIT_PART = 3.0, 0.1
#: Smallest visible side of a box, clipped to the image, at training size in pixels.
VISIBLE = 1.0

Box = tuple[float, float, float, float]


class Findings(Problems):
    """Collects problems instead of refusing the set.

    Attributes:
        counts: how many of each kind.
        found: the first :data:`KEPT` of each kind.
        dropped_images: id of each image that training drops, to the kind of problem.
        dropped_annotations: the same for annotations (by new ids, if assigned).
        repaired: annotation id to the kinds of repair it needs.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.counts: Counter[str] = Counter()
        self.found: dict[str, list[Problem]] = {}
        self.dropped_images: dict[Any, str] = {}
        self.dropped_annotations: dict[Any, str] = {}
        self.repaired: dict[Any, frozenset[str]] = {}
        self._kind_sets: dict[frozenset[str], frozenset[str]] = {}

    def add(self, kind: str, where: Where = NOWHERE, *details: Any, count: int = 1) -> None:
        """Record a finding (``count`` of them in one place)."""
        self.counts[kind] += count
        kept = self.found.setdefault(kind, [])
        if len(kept) < KEPT:
            kept.append(Problem(kind, where, details))

    def refuse(self, kind: str, where: Where, *details: Any) -> None:
        self.add(kind, where, *details)
        if kind == "image-id-repeated":
            self.dropped_images[where.image] = kind

    def drop(self, kind: str, where: Where, *details: Any) -> None:
        self.add(kind, where, *details)
        # Annotations without a known image are dropped by position; see CocoJson.left_out.
        if where.image is not None and where.annotation is None:
            self.dropped_images.setdefault(where.image, kind)
        elif where.image is not None:
            self.dropped_annotations.setdefault(where.annotation, kind)

    def repair(self, kind: str, where: Where, count: int = 1) -> None:
        self.add(kind, where, count=count)
        if where.annotation is not None and not kind.startswith("annotation-"):  # those are recorded by position
            kinds = self.repaired.get(where.annotation, frozenset()) | {kind}
            # Share one set between all annotations with the same repairs: all of COCO may lack iscrowd.
            self.repaired[where.annotation] = self._kind_sets.setdefault(kinds, kinds)

    def of(self, severity: str) -> list[tuple[str, Kind, int]]:
        """Return (name, kind, count) of the kinds found, in the order of ``KINDS``."""
        return [(n, k, self.counts[n]) for n, k in KINDS.items() if k.severity == severity and self.counts[n]]

    def total(self, severity: str) -> int:
        """Return the number of findings of a severity."""
        return sum(count for _, _, count in self.of(severity))


@dataclass(frozen=True)
class Training:
    """The config values that the check needs."""

    short_sides: tuple[int, ...]  # shorter sides that images are resized to (INPUT.MIN_SIZE_TRAIN), 0 for no resize
    max_size: int  # INPUT.MAX_SIZE_TRAIN
    masks_on: bool  # MODEL.MASK_ON
    reader: ImageReader = field(default_factory=ImageReader)  # reads images like training
    caps: Caps = field(default_factory=Caps)  # limits on the number of detections

    @classmethod
    def of(cls, cfg: Any) -> Training:
        sides = cfg.INPUT.MIN_SIZE_TRAIN
        sides = (sides,) if isinstance(sides, int) else tuple(sides)
        return cls(sides, int(cfg.INPUT.MAX_SIZE_TRAIN), bool(cfg.MODEL.MASK_ON), ImageReader.of(cfg), Caps.of(cfg))

    def scale(self, width: int, height: int, side: int) -> tuple[float, float]:
        """Return the x and y factors of ResizeShortestEdge."""
        if side == 0:
            return 1.0, 1.0
        new_height, new_width = resized_shape(height, width, side, self.max_size)
        return new_width / width, new_height / height


@dataclass
class Survey:
    """One dataset after reading it."""

    source: DatasetSource
    split: str  # "train" or "val"
    findings: Findings  # all problems found
    reader: ImageReader = field(default_factory=ImageReader)  # reads its images like training
    #: what training would read, plus objects without a mask; None if nothing could be read
    dataset: CocoDataset | None = None
    content: CocoJson | None = None  # its checked structure
    #: usable images, entries of ``content.images`` in the order of ``dataset``
    images: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[Any, bytes] = field(default_factory=dict)  # content hash by image id, if all images were decoded
    decoded: bool = False  # whether all images were decoded

    def path(self, image: dict[str, Any]) -> str:
        """Return the path of an image file."""
        return os.path.join(self.source.image_root, image["file_name"])


def survey(
    source: DatasetSource, split: str, training: Training, *, decode: bool = False, progress: bool = False
) -> Survey:
    """Read one set and record all its problems; never raises for a defect of the set.

    Args:
        source: the set; generated sets are created first.
        split: "train", or "val", which may lack annotations.
        training: values from the config.
        decode: decode every image, on all cores.
        progress: show progress bars on stderr.
    """
    prepare(source)
    findings = Findings(source.json_file)
    result = Survey(source, split, findings, training.reader)
    with collector_paused():
        try:
            result.content = read_coco_json(source, findings, need_annotations=split == "train")
        except FileProblem as error:
            findings.add(error.problem.kind, Where(file=error.path), *error.problem.details)
            return result
        unusable = _look_at_images(result, result.content, decode, progress)
        result.images = [i for i in result.content.images if i["id"] not in unusable and i["width"]]
        result.dataset = _read_annotations(result, result.content, training, unusable, progress)
    _look_at_the_whole(result, result.content, result.dataset)
    return result


def _bar(progress: bool, total: int, what: str) -> tqdm[Any]:
    # None hides the bar if stderr is not a terminal.
    hidden = None if progress else True
    return tqdm(total=total, desc=what, disable=hidden, leave=False, miniters=64, unit=" images")


def _look_at_images(result: Survey, content: CocoJson, decode: bool, progress: bool) -> set[Any]:
    """Return the ids of unusable images; empty if no image is usable, which counts as one problem, not thousands."""
    images, findings = content.images, result.findings
    try:
        with _bar(progress, len(images), f"{result.split}: image headers") as bar:
            unusable = look_at_images(images, result.source, findings, bar.update, result.reader)
    except FileProblem as error:
        findings.add(error.problem.kind, Where(file=error.path), *error.problem.details)
        return set()
    if len(unusable) == len(images):
        return set()
    if decode:
        left = [image for image in images if image["id"] not in unusable]
        jobs = [DecodeJob(result.path(i), i["width"], i["height"], result.reader) for i in left]
        with _bar(progress, len(jobs), f"{result.split}: decoding") as bar:
            for image, decoded in zip(left, decode_all(jobs)):
                bar.update()
                where = Where(image["id"], image["file_name"])
                if decoded.kind and KINDS[decoded.kind].severity == "error":
                    findings.drop(decoded.kind, where, decoded.text)
                    unusable.add(image["id"])
                elif decoded.kind:
                    findings.add(decoded.kind, where, decoded.text)
                result.digests[image["id"]] = decoded.digest
        result.decoded = True
    return unusable


def _read_annotations(
    result: Survey, content: CocoJson, training: Training, unusable: set[Any], progress: bool
) -> CocoDataset:
    """Read the annotations of all images; those of unusable images are checked but not counted."""
    findings = result.findings
    reader = AnnotationReader(content.category_ids, findings)
    table = check_annotations(content, result.images, reader)
    # Annotations cannot be checked if the image size is unknown or differs from the json.
    others = [
        image
        for image in content.images
        if image["id"] in unusable and image["width"] and findings.dropped_images[image["id"]] != "image-size"
    ]
    with _bar(progress, len(result.images) + len(others), f"{result.split}: annotations") as bar:
        _look_at_objects(table, training, result, bar)
        _look_at_objects(check_annotations(content, others, reader), training, result, bar)
    objects = table[~table.crowd]
    bounds = objects.bounds().tolist()
    capped: list[tuple[Where, int, int]] = []
    for image, start, end in zip(result.images, bounds, bounds[1:]):
        where = Where(image["id"], image["file_name"])
        if start == end:
            findings.add("image-empty", where)
        if result.split == "val" and (lost := training.caps.lost(objects.category[start:end].tolist())):
            capped.append((where, end - start, lost))
    keys = training.caps.keys_for(max((count for _, count, _ in capped), default=0))
    for where, count, lost in capped:
        findings.add("many-objects", where, count, lost, keys)
    refuse_corners(table, findings)
    if "bbox-corners" in findings.counts:
        for kind in ("bbox-mask", "bbox-reaches-out"):  # follow from boxes written as corners
            findings.counts.pop(kind, None)
    return build_dataset(result.source, content, table)


def _look_at_objects(table: AnnotationTable, training: Training, result: Survey, bar: tqdm[Any]) -> None:
    """Check the objects that the loader accepts: in detail only if a fast check over all of them finds something."""
    objects = table[~table.crowd]
    bounds = objects.bounds().tolist()
    for index in np.unique(objects.image[_suspicious(objects, training)]).tolist():
        rows = slice(bounds[index], bounds[index + 1])
        _look_at_image(objects.images[index], objects, range(len(objects))[rows], training, result)
    bar.update(len(table.images))


def _suspicious(objects: AnnotationTable, training: Training) -> np.ndarray:
    """(M,) bool: a superset of the objects that :func:`_look_at_image` reports."""
    box = np.concatenate([objects.bbox[:, :2], objects.bbox[:, :2] + objects.bbox[:, 2:]], axis=1)
    mask, size = objects.hull, objects.sizes
    sizes, of = np.unique(size, axis=0, return_inverse=True)
    scale = np.array([training.scale(w, h, min(training.short_sides)) for w, h in sizes.tolist()]).reshape(-1, 2)[of]
    limits = np.concatenate([size, size], axis=1)
    cut, cut_mask = box.clip(0, limits), mask.clip(0, limits)
    longest = np.max([objects.bbox[:, 2], objects.bbox[:, 3], *(cut_mask[:, 2:] - cut_mask[:, :2]).T], axis=0)
    apart = np.abs(cut - cut_mask).max(axis=1, initial=0) > np.maximum(_FIT_PIXELS, _FIT_PART * longest)
    out = np.maximum(-box[:, :2], box[:, 2:] - size).max(axis=1, initial=-np.inf) > 1
    small = ((cut[:, 2:] - cut[:, :2]) * scale).min(axis=1, initial=np.inf) < VISIBLE
    tiny = objects.bbox.max(axis=1, initial=-np.inf) <= 1
    key = objects.image * 1_000_003 + objects.category  # equal objects have equal keys, few others have
    for column in objects.bbox.T:
        key = key * 1_000_003 ^ (column + 0.0).view(np.int64)
    _, first, count = np.unique(key, return_inverse=True, return_counts=True)
    found: np.ndarray = ~objects.has_mask | apart | out | small | tiny | (count[first] > 1)
    return found


def _look_at_image(
    image: dict[str, Any], objects: AnnotationTable, rows: range, training: Training, result: Survey
) -> None:
    findings = result.findings
    scale = training.scale(image["width"], image["height"], min(training.short_sides))
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        bbox, hull = objects.bbox[row].tolist(), objects.hull[row].tolist()
        where = Where(image["id"], image["file_name"], int(objects.id[row]))
        _look_at_box(bbox, image, scale, findings, where)
        key = (int(objects.category[row]), *bbox)
        if key in seen:
            findings.add("object-twice", where)
        seen.add(key)
        if objects.has_mask[row]:
            _compare(bbox, (hull[0], hull[1], hull[2], hull[3]), image, findings, where)
        elif not training.masks_on:
            findings.add("no-mask-unused", where)
        elif result.split == "val":
            findings.add("no-mask-val", where)
        else:
            findings.drop("no-mask", where)


def _look_at_box(
    bbox: Sequence[float], image: dict[str, Any], scale: tuple[float, float], findings: Findings, where: Where
) -> None:
    x, y, w, h = bbox
    width, height = image["width"], image["height"]
    if max(bbox) <= 1 and min(width, height) > 1 and any(v != int(v) for v in bbox):
        findings.add("bbox-normalised", where, _short(bbox))
        return
    if max(-x, -y, x + w - width, y + h - height) > 1:
        findings.add("bbox-reaches-out", where, _short(bbox), width, height)
    x0, y0, x1, y1 = _inside((x, y, x + w, y + h), image)
    seen = (x1 - x0) * scale[0], (y1 - y0) * scale[1]
    if min(seen) < VISIBLE:
        findings.add("object-vanishes", where, _short(bbox), *seen)


def _compare(bbox: Sequence[float], found: Box, image: dict[str, Any], findings: Findings, where: Where) -> None:
    """Compare an XYWH box with ``found``, the XYXY box of its mask."""
    x, y, w, h = bbox
    mask = _inside(found, image)
    slack = max(_FIT_PIXELS, _FIT_PART * max(w, h, mask[2] - mask[0], mask[3] - mask[1]))
    if _apart(_inside((x, y, x + w, y + h), image), mask) <= slack:
        return
    hint = "draw it again, or use the box of the mask"
    if _apart(_inside((x, y, w, h), image), mask) <= _FIT_PIXELS:
        hint = "it fits as [x0, y0, x1, y1], COCO boxes are [x, y, width, height]"
    fitting = [round(v, 1) for v in (mask[0], mask[1], mask[2] - mask[0], mask[3] - mask[1])]
    findings.add("bbox-mask", where, _short(bbox), _short(fitting), hint)


def _inside(box: Box, image: dict[str, Any]) -> Box:
    """Clip the XYXY box to its image."""
    width, height = image["width"], image["height"]
    x0, y0, x1, y1 = box
    return min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(p - q) for p, q in zip(a, b))


def _short(bbox: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in bbox) + "]"


def _look_at_the_whole(result: Survey, content: CocoJson, dataset: CocoDataset) -> None:
    """Find files named twice, identical images and classes without objects."""
    findings = result.findings
    first: dict[Any, Any] = {}
    for image in content.images:
        other = first.setdefault(os.path.normpath(image["file_name"]), image["id"])
        if other != image["id"]:
            findings.add("file-twice", Where(image["id"], image["file_name"]), other)
    by_content: dict[bytes, dict[str, Any]] = {}
    for image in result.images:
        digest = result.digests.get(image["id"])
        same = by_content.setdefault(digest, image) if digest else image
        if same["file_name"] != image["file_name"]:
            findings.add("content-twice", Where(image["id"], image["file_name"]), same["id"], same["file_name"])
    if not content.has_annotations:
        findings.add("no-truth", NOWHERE, result.source.json_file)
    elif len(dataset.object_images):
        for name, count in zip(dataset.class_names, dataset.class_counts):
            if count == 0:
                findings.add("class-empty", NOWHERE, repr(name))
