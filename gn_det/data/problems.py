"""Table of dataset problems, shared by training, evaluation and ``gn-det check``, so that they cannot disagree.

One reader (:mod:`gn_det.data.coco_json`, :mod:`gn_det.data.annotations`, :mod:`gn_det.data.image_files`) finds the
problems and reports them to a :class:`Problems`. That of training stops at the first problem of the file as a whole and
counts dropped entries. That of the check (:class:`gn_det.check.audit.Findings`) collects everything.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

from gn_det.errors import DataError
from gn_det.text import one_line, printable

Severity = Literal["error", "warning", "note"]


class Kind(NamedTuple):
    """One kind of problem."""

    severity: Severity  # an error is what training refuses or drops, and nothing else
    title: str  # headline of all findings of the kind
    #: what training does in memory (warnings) and ``gn-det check --fix`` does in the file; empty if only a person
    #: can decide
    fix: str = ""
    text: str = ""  # ``str.format`` template of one finding; empty if the title is enough
    blocks: bool = False  # whether it keeps ``--fix`` from writing anything


_OUT = "the annotation is left out"
_IMAGE_OUT = "the image and its annotations are left out"
_COPY_OUT = "the copy is left out"
_FROM_MASK = "computed from the mask"
_NEW_ID = "a new id is given"
_NO_MASK = "has no segmentation: add it"


def _stop(title: str, text: str = "{}") -> Kind:
    return Kind("error", title, "", text, blocks=True)


def _error(title: str, fix: str, text: str = "{}") -> Kind:
    return Kind("error", title, fix, text)


def _repaired(title: str, fix: str) -> Kind:
    return Kind("warning", title, fix)


def _warning(title: str, text: str = "{}") -> Kind:
    return Kind("warning", title, "", text)


def _note(title: str, text: str = "") -> Kind:
    return Kind("note", title, "", text)


#: All kinds.
# fmt: off
KINDS: dict[str, Kind] = {
    # the file as a whole
    "json-unreadable": _stop("the annotation file cannot be read"),
    "json-structure": _stop("not COCO's instances format", "{}: give a COCO instances json"),
    "categories-missing": _stop("no categories",
        "'categories' is missing or empty: add one entry {{\"id\": 1, \"name\": ...}} for each class"),
    "category-malformed": _stop("categories without integer id or usable name",
        "category {} needs an integer 'id' and a 'name' of 1 to 480 characters without control characters"),
    "category-id-repeated": _stop("category ids used twice",
        "category id {} appears more than once ({}, {}): give every category its own id"),
    "category-copy": _error("categories listed twice", _COPY_OUT, "category id {} appears more than once"),
    "category-name-repeated": _error("category names used twice", "merged into the lowest id",
        "category name {} is used by ids {}: give every category its own name"),
    "images-missing": _stop("no images", "'images' is missing or empty: give a COCO instances json"),
    "image-no-id": _error("images without id", "the image is left out",
        "entry {} of 'images' has no 'id' (an integer): add it"),
    "image-copy": _error("images listed twice", _COPY_OUT, "image id {} appears more than once ({}, {})"),
    "image-id-repeated": _error("image ids used by several images", "all images of that id are left out",
        "image id {} appears more than once ({}, {}): give every image its own id"),
    "image-folder": _stop("the image folder cannot be used"),
    "classes-differ": _stop("train and val have different categories"),
    "num-classes": _stop("MODEL.ROI_HEADS.NUM_CLASSES does not fit the categories"),
    "no-objects": _stop("nothing to learn from"),
    "no-masks": _stop("no object has a mask, MODEL.MASK_ON needs them"),
    # images that are dropped
    "image-entry": _error("images without file_name or size", _IMAGE_OUT, "{}: add it"),
    "image-missing": _error("missing image files", _IMAGE_OUT),
    "image-damaged": _error("image files that are damaged, truncated or not images", _IMAGE_OUT),
    "image-size": _error("images whose size differs from the json", _IMAGE_OUT),
    "image-depth": _error("images of more than 8 bits: INPUT.BIT_DEPTH says how to scale them", _IMAGE_OUT),
    "image-large": _error("images of more pixels than INPUT.MAX_PIXELS", _IMAGE_OUT),
    # annotations that are dropped
    "annotation-entry": _error("annotations that are not objects", _OUT,
        "entry {} of 'annotations' is not an object: {}"),
    "image-unknown": _error("annotations of images that are not listed", _OUT,
        "image_id {} is not in 'images': add the image, or remove the annotation"),
    "category-unknown": _error("annotations of categories that are not listed", _OUT,
        "category_id {} is not in the json's categories ({})"),
    "ignore": _error("annotations with 'ignore'", _OUT,
        "'ignore' is not part of COCO's instances format: mark regions to ignore with iscrowd 1"),
    "iscrowd": _error("iscrowd other than 0 or 1", _OUT, "iscrowd {} is not 0 or 1"),
    "bbox-format": _error("boxes that are not four finite numbers", _OUT,
        "bbox {} is not [x, y, width, height] in finite numbers"),
    "bbox-no-area": _error("boxes without area", _OUT,
        "bbox {} has no area (COCO boxes are [x, y, width, height]): fix or remove it"),
    "bbox-outside": _error("boxes outside their image", _OUT, "bbox {} is outside the {}x{} image: fix or remove it"),
    "bbox-far": _error("boxes that reach far outside their image", _OUT,
        "bbox {} reaches far outside the {}x{} image: coordinates are pixels; fix or remove it"),
    "segmentation-format": _error("segmentations that are neither polygons nor RLE", _OUT,
        "segmentation is neither a list of polygons [[x0, y0, x1, y1, ...], ...] nor an RLE (size, counts)"),
    "polygon-no-number": _error("polygon coordinates that are not finite numbers", _OUT,
        "segmentation has polygon coordinates that are not finite numbers: a polygon is [x0, y0, x1, y1, ...]"),
    "polygon-short": _error("masks without a polygon of 3 points or more", _OUT,
        "segmentation has no usable polygon (3 points or more as [x0, y0, x1, y1, ...], an even number of coordinates)"
        ": draw it again or remove the annotation"),
    "polygon-far": _error("polygons that reach far outside their image", _OUT,
        "segmentation has a vertex at ({:g}, {:g}), far outside the {}x{} image: coordinates are pixels; fix or "
        "remove it"),
    "rle-format": _error("damaged RLE", _OUT, "RLE {}: encode the mask again"),
    "rle-size": _error("RLE size differs from the image", _OUT, "RLE size {} is not the image's [height, width] {}"),
    "rle-length": _error("RLE of a wrong length", _OUT,
        "RLE counts cover {} pixels, the image has {}: the mask is damaged or belongs to another image size, encode "
        "it again"),
    "rle-empty": _error("RLE without foreground", _OUT, "RLE has no foreground pixel: remove the annotation"),
    "no-mask": _error("objects without a mask", _OUT, _NO_MASK),
    # all boxes together
    "bbox-corners": _error("boxes written as [x1, y1, x2, y2]", "written as [x, y, width, height]",
        "boxes are written as [x1, y1, x2, y2], COCO boxes are [x, y, width, height]: {}: write [x1, y1, x2 - x1, y2 "
        "- y1], as gn-det check --fix does"),
    # what training repairs in memory
    "id-type": _repaired("ids written as 77.0 or as text", "read as integers"),
    "image-no-size": _repaired("images without usable width and height", "taken from the image files"),
    "image-name": _repaired("file names that differ from the files in backslash, letter case, Unicode form or %20",
        "replaced by the names on disk"),
    "bbox-missing": _repaired("annotations without a box", _FROM_MASK),
    "bbox-unusable": _repaired("unusable boxes of objects that have a mask", _FROM_MASK),
    "annotation-no-id": _repaired("annotations without integer id", _NEW_ID),
    "annotation-id-zero": _repaired("annotation ids of 0 or below", _NEW_ID),
    "annotation-id-repeated": _repaired("annotation ids used twice", _NEW_ID),
    "annotation-copy": _repaired("annotations listed twice", _COPY_OUT),
    "iscrowd-missing": _repaired("annotations without iscrowd", "taken as 0"),
    "area-missing": _repaired("annotations without usable area", "computed from mask or box"),
    "polygon-piece": _repaired("polygon parts with fewer than 3 points or an odd coordinate", "the piece is left out"),
    # accepted by training, but possibly wrong
    "polygon-empty": _repaired("polygons that cover no pixel", "kept in training, left out of the copy"),
    "image-constant": _warning("images of a single color", "every pixel is {}: the image is blank"),
    "bbox-mask": _warning("boxes that do not fit their masks", "bbox {}, its mask covers {}: {}"),
    "bbox-normalised": _warning("boxes in fractions of the image, not in pixels",
        "bbox {} is below one pixel: multiply by the width and height of the image"),
    "object-twice": _warning("objects annotated twice (same image, category and box)", "remove one of the two"),
    "object-vanishes": _warning("objects below one pixel at training size",
        "bbox {} is {:.2g}x{:.2g} pixels at training size: remove it, or raise INPUT.MIN_SIZE_TRAIN"),
    "image-checksum": _warning("PNG files with a wrong checksum outside the pixels (they decode)"),
    "file-twice": _warning("image files used by several images",
        "the same file as image {}: put all annotations under one image"),
    "content-twice": _warning("equal images under different names", "the same pixels as image {} ({}): remove one"),
    "overlap-file": _warning("image files in both train and val",
        "image {} of val is the same file: AP on it would be too good; remove it from one of the two"),
    "overlap-content": _warning("equal images in both train and val",
        "the same pixels as image {} ({}) of val: AP on it would be too good; remove it from one of the two"),
    "no-mask-val": _warning("objects without a mask in val", _NO_MASK),
    "many-objects": _warning("images with more objects than the detection limits allow",
        "{} objects, {} of which cannot be found: set {}"),
    "no-truth": _warning("no annotations in val: AP cannot be measured", "{} has no 'annotations'"),
    "class-ids-differ": _note("train and val number the same classes differently",
        "{}: gn_det matches classes by name; other tools match them by id"),
    "bbox-reaches-out": _note("boxes that reach past the image border (training cuts them)",
        "bbox {} reaches past the {}x{} image"),
    "classes-lacking": _note("classes of train that val lacks: no AP for them", "{} has no category {}"),
    "no-mask-unused": _note("objects without a mask (MODEL.MASK_ON is False)", _NO_MASK),
    "small-for-anchors": _note("many objects are small for the anchors",
        "{:.0%} of the objects are smaller than half the smallest anchor ({:g} pixels): raise INPUT.MIN_SIZE_TRAIN, "
        "or add smaller anchors (MODEL.ANCHOR_GENERATOR.SIZES)"),
    "image-empty": _note("images without objects (training leaves them out by default)"),
    "class-empty": _note("classes without an object", "no object of {}"),
}
# fmt: on


class Where(NamedTuple):
    """Where a problem is, as far as known."""

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


class Problem(NamedTuple):
    """One problem in one place; ``details`` fill in the text of its kind."""

    kind: str
    where: Where = NOWHERE
    details: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """Description without the place; empty if the title of the kind is enough."""
        return KINDS[self.kind].text.format(*self.details)

    def __str__(self) -> str:
        """Return place and problem as one line, naming the file only once."""
        text, where = self.text, self.where
        if where.file and where.file in text:
            where = where._replace(file="")
        return printable(": ".join(part for part in (str(where), text) if part), keep="")


class FileProblem(DataError):
    """A problem that makes a whole file unusable: its ``path``, the ``problem``, and a hint."""

    def __init__(self, path: str, problem: Problem, hint: str = "") -> None:
        super().__init__(path, problem, hint)
        self.path, self.problem, self.hint = path, problem, hint

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.problem}{self.hint}", keep="")


class Problems:
    """Receives the problems that the reader of one file finds; this class is training's.

    Attributes:
        path: the json file.
        bad: all dropped entries.
        repairs: kind of repair to its count and first place.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.bad: list[str] = []
        self.repairs: dict[str, tuple[int, Where]] = {}

    def stop(self, kind: str, *details: Any) -> NoReturn:
        """Stop: nothing more can be read."""
        raise FileProblem(self.path, Problem(kind, details=details))

    def refuse(self, kind: str, where: Where, *details: Any) -> None:
        """Refuse a file that is ambiguous as a whole; training stops here."""
        raise FileProblem(self.path, Problem(kind, where, details), " (gn-det check lists every problem)")

    def drop(self, kind: str, where: Where, *details: Any) -> None:
        """Record an unusable entry."""
        self.bad.append(str(Problem(kind, where, details)))

    def repair(self, kind: str, where: Where, count: int = 1) -> None:
        """Record a repair made in memory."""
        before, first = self.repairs.get(kind, (0, where))
        self.repairs[kind] = (before + count, first)

    def notes(self) -> list[str]:
        """Return one line for each kind of repair."""
        return [
            f"{KINDS[kind].title}: {KINDS[kind].fix} ({count}, first: {first})"
            for kind, (count, first) in self.repairs.items()
        ]
