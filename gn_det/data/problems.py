"""What can be wrong with a dataset, and what is done about it: by training, and by ``gn-det check``.

One reader (:mod:`gn_det.data.coco_file`, :mod:`gn_det.data.coco`) finds the problems; what happens next is up to the
:class:`Problems` it reports to. Training stops at the first problem of the file as a whole and counts the entries that
it drops; the check (:mod:`gn_det.check.findings`) writes everything down and goes on. So the two cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn

from gn_det.errors import DataError
from gn_det.text import one_line, printable

Severity = Literal["error", "warning", "note"]


class Kind(NamedTuple):
    """One kind of problem: how bad it is, its headline, and what ``gn-det check --fix`` does about it."""

    severity: Severity
    title: str
    #: Empty where only a person can decide; such an error keeps ``--fix`` from writing where ``blocks`` is True.
    fix: str = ""
    blocks: bool = False


@dataclass(frozen=True)
class Where:
    """Place of a problem, as far as it is known."""

    image: Any = None
    file: str = ""
    annotation: Any = None

    def __str__(self) -> str:
        parts = [] if self.annotation is None else [f"annotation {one_line(self.annotation, 60)}"]
        if self.image is not None:
            parts.append(f"image {one_line(self.image, 60)}")
        text, file = " of ".join(parts), one_line(self.file, 300)
        return f"{text} ({file})" if file and text else text or file


NOWHERE = Where()


def in_words(where: Where, text: str) -> str:
    """Place and problem as one line; the file is not named twice."""
    if where.file and where.file in text:
        where = replace(where, file="")
    return printable(f"{where}: {text}" if str(where) else text, keep="")


_OUT = "the annotation is left out"
_IMAGE_OUT = "the image and its annotations are left out"


def _stop(title: str) -> Kind:
    return Kind("error", title, blocks=True)


#: Every kind there is. The errors are what training refuses or drops, nothing else is one.
KINDS: dict[str, Kind] = {
    # the file as a whole
    "json-unreadable": _stop("the annotation file cannot be read"),
    "json-structure": _stop("not COCO's instances format"),
    "categories-missing": _stop("no categories"),
    "category-malformed": _stop("categories without integer id or name"),
    "category-id-repeated": _stop("category ids used twice"),
    "category-copy": Kind("error", "categories listed twice", "the copy is left out"),
    "category-name-repeated": Kind("error", "category names used twice", "merged into the lowest id"),
    "images-missing": _stop("no images"),
    "image-no-id": Kind("error", "images without id", "the image is left out"),
    "image-copy": Kind("error", "images listed twice", "the copy is left out"),
    "image-id-repeated": Kind("error", "image ids used by several images", "all images of that id are left out"),
    "image-folder": _stop("the image folder cannot be used"),
    "classes-differ": _stop("train and val have different categories"),
    "num-classes": _stop("MODEL.ROI_HEADS.NUM_CLASSES does not fit the categories"),
    "no-objects": _stop("nothing to learn from"),
    "no-masks": _stop("no object has a mask, MODEL.MASK_ON needs them"),
    # images that are dropped
    "image-entry": Kind("error", "images without file_name", _IMAGE_OUT),
    "image-missing": Kind("error", "image files that are not there", _IMAGE_OUT),
    "image-damaged": Kind("error", "image files that are damaged, cut off or no images", _IMAGE_OUT),
    "image-size": Kind("error", "images of another size than the json says", _IMAGE_OUT),
    "image-depth": Kind("error", "images of more than 8 bits: INPUT.BIT_DEPTH says how to scale them", _IMAGE_OUT),
    "image-large": Kind("error", "images of more pixels than INPUT.MAX_PIXELS", _IMAGE_OUT),
    # annotations that are dropped
    "annotation-entry": Kind("error", "annotations that are no objects", _OUT),
    "image-unknown": Kind("error", "annotations of images that are not listed", _OUT),
    "category-unknown": Kind("error", "annotations of categories that are not listed", _OUT),
    "ignore": Kind("error", "annotations with 'ignore'", _OUT),
    "iscrowd": Kind("error", "iscrowd other than 0 or 1", _OUT),
    "bbox-format": Kind("error", "boxes that are not four finite numbers", _OUT),
    "bbox-no-area": Kind("error", "boxes without area", _OUT),
    "bbox-outside": Kind("error", "boxes outside their image", _OUT),
    "bbox-far": Kind("error", "boxes that reach far outside their image", _OUT),
    "segmentation-format": Kind("error", "segmentations that are neither polygons nor RLE", _OUT),
    "polygon-no-number": Kind("error", "polygon coordinates that are not finite numbers", _OUT),
    "polygon-short": Kind("error", "masks without a polygon of 3 points or more", _OUT),
    "polygon-far": Kind("error", "polygons that reach far outside their image", _OUT),
    "rle-format": Kind("error", "damaged RLE", _OUT),
    "rle-size": Kind("error", "RLE of another size than the image", _OUT),
    "rle-length": Kind("error", "RLE of a wrong length", _OUT),
    "rle-empty": Kind("error", "RLE without foreground", _OUT),
    "no-mask": Kind("error", "objects without a mask", _OUT),
    # all boxes together
    "bbox-corners": Kind("error", "boxes written as [x1, y1, x2, y2]", "written as [x, y, width, height]"),
    # what training repairs in memory
    "id-type": Kind("warning", "ids written as 77.0 or as text", "written as whole numbers"),
    "image-no-size": Kind("warning", "images without width and height", "taken from the image file"),
    "image-name": Kind(
        "warning",
        "file names that differ from the files in backslash, letter case, Unicode form or %20",
        "the file's own name is written",
    ),
    "bbox-missing": Kind("warning", "annotations without a box", "computed from the mask"),
    "bbox-unusable": Kind("warning", "unusable boxes of objects that have a mask", "computed from the mask"),
    "annotation-no-id": Kind("warning", "annotations without integer id", "a new id is given"),
    "annotation-id-zero": Kind("warning", "annotation ids of 0 or below", "a new id is given"),
    "annotation-id-repeated": Kind("warning", "annotation ids used twice", "a new id is given"),
    "annotation-copy": Kind("warning", "annotations listed twice", "the copy is left out"),
    "iscrowd-missing": Kind("warning", "annotations without iscrowd", "iscrowd 0 is written"),
    "area-missing": Kind("warning", "annotations without usable area", "computed from mask or box"),
    "polygon-piece": Kind("warning", "polygon pieces with fewer than 3 points", "the piece is left out"),
    # what training takes as it is, and what may still be wrong
    "polygon-empty": Kind("warning", "polygons that cover no pixel", _OUT),
    "image-constant": Kind("warning", "images of one colour all over"),
    "bbox-mask": Kind("warning", "boxes that do not fit their masks"),
    "bbox-normalised": Kind("warning", "boxes in fractions of the image, not in pixels"),
    "object-twice": Kind("warning", "objects annotated twice (same image, category and box)"),
    "object-vanishes": Kind("warning", "objects below one pixel at training size"),
    "image-checksum": Kind("warning", "PNG files with a wrong checksum beside the pixels: they decode"),
    "file-twice": Kind("warning", "image files used by several images"),
    "content-twice": Kind("warning", "equal pictures under different names"),
    "overlap-file": Kind("warning", "image files in both train and val"),
    "overlap-content": Kind("warning", "equal pictures in both train and val"),
    "no-mask-val": Kind("warning", "objects without a mask in val"),
    "many-objects": Kind("warning", "images with more objects than the caps on detections let count"),
    "no-truth": Kind("warning", "no annotations in val: nothing can be measured"),
    "class-ids-differ": Kind("note", "train and val number the same classes differently"),
    "bbox-reaches-out": Kind("note", "boxes that reach past the image border (training cuts them)"),
    "classes-lacking": Kind("note", "classes of train that val lacks: no AP for them"),
    "no-mask-unused": Kind("note", "objects without a mask (MODEL.MASK_ON is False)"),
    "small-for-anchors": Kind("note", "many objects are small for the anchors"),
    "image-empty": Kind("note", "images without objects (training leaves them out by default)"),
    "class-empty": Kind("note", "classes without an object"),
}


class FileProblem(DataError):
    """A mistake that makes a file as a whole unusable; ``kind`` is a key of :data:`KINDS`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, printable(text, keep="")

    def __str__(self) -> str:
        return self.text


class Problems:
    """Where the reader of one file reports what it finds; this one is training's.

    Attributes:
        path: the json file.
        bad: one line for every entry that is dropped.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.bad: list[str] = []
        self._repairs: dict[str, tuple[int, str, Where]] = {}

    def stop(self, kind: str, text: str) -> NoReturn:
        """Nothing more can be read after this."""
        raise FileProblem(kind, text)

    def refuse(self, kind: str, text: str, where: Where = NOWHERE) -> None:
        """The file as a whole is ambiguous: training stops here."""
        raise FileProblem(kind, f"{self.path}: {text} (gn-det check lists every problem)")

    def drop(self, kind: str, text: str, where: Where = NOWHERE) -> None:
        """An entry that cannot be used."""
        self.bad.append(in_words(where, text))

    def repair(self, kind: str, what: str, where: Where, count: int = 1) -> None:
        """Something that was repaired in memory."""
        before, _, first = self._repairs.get(kind, (0, "", where))
        self._repairs[kind] = (before + count, what, first)

    def notes(self) -> list[str]:
        """One line for every kind of repair."""
        return [f"{count} {what} (first: {first})" for count, what, first in self._repairs.values()]


class Caps(NamedTuple):
    """What limits how many objects of an image can be found, however good the model is.

    Attributes:
        max_dets: TEST.MAX_DETS, detections that count for each class.
        detections: TEST.DETECTIONS_PER_IMAGE of all classes together; None where unknown.
        proposals: MODEL.RPN.POST_NMS_TOPK_TEST; None where unknown, and where the model has no RPN.
    """

    max_dets: int = 100
    detections: int | None = None
    proposals: int | None = None

    @classmethod
    def of(cls, cfg: Any) -> Caps:
        """Those of ``cfg``; Detectron2's own configs lack TEST.MAX_DETS."""
        has_rpn = cfg.MODEL.META_ARCHITECTURE not in ("RetinaNet", "FCOS")
        proposals = int(cfg.MODEL.RPN.POST_NMS_TOPK_TEST) if has_rpn else None
        return cls(int(cfg.TEST.get("MAX_DETS", 100)), int(cfg.TEST.DETECTIONS_PER_IMAGE), proposals)

    def lost(self, classes: Sequence[int]) -> int:
        """How many objects of an image, given by their classes, cannot be found."""
        count = len(classes)
        total = min(count if cap is None else cap for cap in (self.detections, self.proposals))
        if count <= min(self.max_dets, total):
            return 0
        return count - min(sum(min(n, self.max_dets) for n in Counter(classes).values()), total)

    def in_words(self, objects: int) -> str:
        """The keys with their values; that of the proposals where it is too low for that many objects."""
        parts = [f"TEST.MAX_DETS {self.max_dets}"]
        if self.detections is not None:
            parts.append(f"TEST.DETECTIONS_PER_IMAGE {self.detections}")
        if self.proposals is not None and self.proposals < objects:
            parts.append(f"{_PROPOSALS} {self.proposals}")
        return " and ".join(parts)

    def keys_for(self, objects: int) -> str:
        """The keys to set where an image has that many objects, with room for false detections."""
        cap = -(-objects // 100) * 100
        keys = f"TEST.MAX_DETS {max(cap, self.max_dets)} TEST.DETECTIONS_PER_IMAGE {max(cap, self.detections or 0)}"
        if self.proposals is not None and self.proposals < objects:
            keys += f" {_PROPOSALS} {max(2 * cap, 1000)}"  # most proposals are of the same objects or of none
        return keys


_PROPOSALS = "MODEL.RPN.POST_NMS_TOPK_TEST"
