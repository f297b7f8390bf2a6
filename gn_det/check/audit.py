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

from gn_det.check.decode import decode_all, digest_of
from gn_det.data.annotation_table import AnnotationTable, check_annotations, refuse_corners
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, build_dataset
from gn_det.data.coco_json import CocoJson, collector_paused, read_coco_json
from gn_det.data.image import ImageReader
from gn_det.data.image_files import look_at_images
from gn_det.data.problems import KINDS, NOWHERE, FileProblem, Kind, Problem, Problems, Where
from gn_det.data.records import Record
from gn_det.data.shapes import prepare
from gn_det.data.transforms import resized_shape
from gn_det.evaluation.diagnose import Caps

#: Findings of one kind that are kept with place and text; further ones are only counted.
KEPT = 1000
#: A box edge may differ from its mask by this many pixels, or by this share of the longer side.
_FIT_PIXELS, _FIT_PART = 3.0, 0.1
#: Smallest visible side of a box, clipped to the image, at training size in pixels.
VISIBLE = 1.0


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

    def stopped(self, error: FileProblem) -> None:
        """Record the problem that kept a file from being read further."""
        self.add(error.problem.kind, Where(file=error.path), *error.problem.details)

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
        # An id that is no integer is replaced, and such repairs are recorded by position.
        if isinstance(where.annotation, int) and not kind.startswith("annotation-"):
            kinds = self.repaired.get(where.annotation, frozenset()) | {kind}
            # Share one set between all annotations with the same repairs: all of COCO may lack iscrowd.
            self.repaired[where.annotation] = self._kind_sets.setdefault(kinds, kinds)

    def kinds(self) -> list[tuple[str, Kind, int]]:
        """Return (name, kind, count) of the kinds found, in the order of ``KINDS``: errors, warnings, notes."""
        return [(name, kind, self.counts[name]) for name, kind in KINDS.items() if self.counts[name]]

    def total(self, severity: str) -> int:
        """Return the number of findings of a severity."""
        return sum(count for _, kind, count in self.kinds() if kind.severity == severity)


@dataclass(frozen=True)
class Training:
    """The config values that the check needs."""

    short_sides: tuple[int, ...]  # shorter sides that images are resized to (INPUT.MIN_SIZE_TRAIN)
    max_size: int  # INPUT.MAX_SIZE_TRAIN
    masks_on: bool  # MODEL.MASK_ON
    reader: ImageReader = field(default_factory=ImageReader)  # reads images like training
    caps: Caps = field(default_factory=Caps)  # limits on the number of detections

    @classmethod
    def of(cls, cfg: Any) -> Training:
        sides, longest = tuple(cfg.INPUT.MIN_SIZE_TRAIN), int(cfg.INPUT.MAX_SIZE_TRAIN)
        return cls(sides, longest, bool(cfg.MODEL.MASK_ON), ImageReader.of(cfg), Caps.of(cfg))

    def scales(self, sizes: np.ndarray, side: int) -> np.ndarray:
        """Return (N, 2) x and y factors of ResizeShortestEdge to ``side`` for images of (N, 2) widths and heights."""
        resized = [resized_shape(height, width, side, self.max_size)[::-1] for width, height in sizes.tolist()]
        factors: np.ndarray = np.array(resized, dtype=np.float64).reshape(-1, 2) / sizes
        return factors


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

    def digest(self, image: dict[str, Any]) -> bytes:
        """Return the content hash of an image file, b"" if it cannot be read; each file is read once."""
        if not self.digests.get(image["id"]):
            self.digests[image["id"]] = digest_of(self.path(image))
        return self.digests[image["id"]]


def survey(source: DatasetSource, split: str, training: Training, *, decode: bool = False) -> Survey:
    """Read one set and record all its problems; never raises for a defect of the set.

    Args:
        source: the set; generated sets are created first.
        split: "train", or "val", which may lack annotations.
        training: values from the config.
        decode: decode every image, on all cores.
    """
    prepare(source)
    findings = Findings(source.json_file)
    result = Survey(source, split, findings, training.reader)
    with collector_paused():
        try:
            result.content = read_coco_json(source, findings, need_annotations=split == "train")
        except FileProblem as error:
            findings.stopped(error)
            return result
        unusable = _look_at_images(result, result.content, decode)
        result.images = [i for i in result.content.images if i["id"] not in unusable and i["width"]]
        result.dataset = _read_annotations(result, result.content, training, unusable)
    _look_at_the_whole(result, result.content, result.dataset)
    return result


def _bar(total: int, what: str) -> tqdm[Any]:
    # disable=None hides the bar if stderr is not a terminal.
    return tqdm(total=total, desc=what, disable=None, leave=False, miniters=64, unit=" images")


def _look_at_images(result: Survey, content: CocoJson, decode: bool) -> set[Any]:
    """Return the ids of unusable images; empty if no image is usable, which counts as one problem, not thousands."""
    images, findings = content.images, result.findings
    try:
        with _bar(len(images), f"{result.split}: image headers") as bar:
            unusable = look_at_images(images, result.source, findings, bar.update, result.reader)
    except FileProblem as error:
        findings.stopped(error)
        return set()
    if len(unusable) == len(images):
        return set()
    if decode:
        left = [image for image in images if image["id"] not in unusable]
        records = [Record(file_name=result.path(i), width=i["width"], height=i["height"]) for i in left]
        with _bar(len(left), f"{result.split}: decoding") as bar:
            for image, decoded in zip(left, decode_all(records, result.reader)):
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


def _read_annotations(result: Survey, content: CocoJson, training: Training, unusable: set[Any]) -> CocoDataset:
    """Read the annotations of all images; those of unusable images are checked but not counted."""
    findings = result.findings
    table = check_annotations(content, result.images, findings)
    # Annotations cannot be checked if the image size is unknown or differs from the json.
    dropped = [image for image in content.images if image["id"] in unusable and image["width"]]
    others = [image for image in dropped if findings.dropped_images[image["id"]] != "image-size"]
    _look_at_objects(table, training, result)
    _look_at_objects(check_annotations(content, others, findings), training, result)
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


def _look_at_objects(table: AnnotationTable, training: Training, result: Survey) -> None:
    """Check the objects that the loader accepts, all at once; only what is found is looked at one by one."""
    objects, findings = table[~table.crowd], result.findings
    bbox, size = objects.bbox, objects.sizes
    limits = np.concatenate([size, size], axis=1)
    corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
    box, mask = corners.clip(0, limits), objects.hull.clip(0, limits)  # XYXY within the image; NaN without a mask
    sizes, of = np.unique(size, axis=0, return_inverse=True)
    visible = (box[:, 2:] - box[:, :2]) * training.scales(sizes, min(training.short_sides))[of]
    fractions = (bbox.max(axis=1) <= 1) & (size.min(axis=1) > 1) & (bbox % 1 != 0).any(axis=1)
    out = ~fractions & (np.maximum(-corners[:, :2], corners[:, 2:] - size).max(axis=1) > 1)
    vanishes = ~fractions & (visible.min(axis=1) < VISIBLE)
    twice, bare = _repeated(objects), ~objects.has_mask
    longest = np.max([bbox[:, 2], bbox[:, 3], *(mask[:, 2:] - mask[:, :2]).T], axis=0)
    apart = np.abs(box - mask).max(axis=1) > np.maximum(_FIT_PIXELS, _FIT_PART * longest)
    as_corners = np.abs(bbox.clip(0, limits) - mask).max(axis=1) <= _FIT_PIXELS
    for row in np.flatnonzero(fractions | out | vanishes | twice | apart | bare).tolist():
        image, given = objects.images[objects.image[row]], _short(bbox[row].tolist())
        where = Where(image["id"], image["file_name"], int(objects.id[row]))
        if fractions[row]:
            findings.add("bbox-normalised", where, given)
        if out[row]:
            findings.add("bbox-reaches-out", where, given, image["width"], image["height"])
        if vanishes[row]:
            findings.add("object-vanishes", where, given, *visible[row].tolist())
        if twice[row]:
            findings.add("object-twice", where)
        if apart[row]:
            x0, y0, x1, y1 = mask[row].tolist()
            hint = "draw it again, or use the box of the mask"
            if as_corners[row]:
                hint = "it fits as [x0, y0, x1, y1], COCO boxes are [x, y, width, height]"
            findings.add("bbox-mask", where, given, _short([round(v, 1) for v in (x0, y0, x1 - x0, y1 - y0)]), hint)
        if bare[row] and training.masks_on and result.split != "val":
            findings.drop("no-mask", where)
        elif bare[row]:
            findings.add("no-mask-val" if training.masks_on else "no-mask-unused", where)


def _repeated(objects: AnnotationTable) -> np.ndarray:
    """(M,) bool: whether an object before it has the same image, category and box."""
    columns = [*objects.bbox.T, objects.category, objects.image]
    order = np.lexsort(columns)  # stable: the first of equal objects stays the first
    found = np.zeros(len(objects), bool)
    found[order[1:]] = np.all([column[order[1:]] == column[order[:-1]] for column in columns], axis=0)
    return found


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
