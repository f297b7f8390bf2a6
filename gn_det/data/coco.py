"""COCO-format json to :class:`CocoDataset`: read, checked, compact.

Structure that makes the file as a whole ambiguous (no categories, repeated image ids ...) is refused at once. Single
bad annotations and images are listed and dropped, up to ``DATALOADER.MAX_BAD`` of them; more than that is a sign of a
systematic mistake and refused, too. What can be repaired without guessing (no ``area``, no ``iscrowd``, ids that are
missing, 0, repeated or written as 77.0, sizes that the image files have, boxes that the masks have, file names that
differ from the only matching file in how they are written) is repaired in memory and noted in the summary.
"""

from __future__ import annotations

import itertools
import logging
import os
import posixpath
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from gn_det.data.catalog import DatasetSource, prepare
from gn_det.data.checks import Defect, check_box, check_segmentation, covers_no_pixel, is_number, mask_area, mask_box
from gn_det.data.coco_file import CocoFile, read_coco_file, resolve_id
from gn_det.data.image import ImageError, ImageReader, values_in_words
from gn_det.data.problems import Problems, Where, in_words
from gn_det.data.records import Annotation, Record, RecordList
from gn_det.errors import DataError
from gn_det.text import one_line, printable, shown

logger = logging.getLogger(__name__)

#: What every message about dropped or refused entries ends with.
CHECK_HINT = "gn-det check lists all of them, and --fix writes a copy without them"

#: How many messages a refusal quotes; all of them are in the log.
_QUOTED = 3
_HEADER_THREADS = 8
#: From so many images on, the log says that they are being looked at: it takes a while.
_MANY_IMAGES = 20_000
#: Shares of boxes that leave their image as XYWH, and that fit as corners, where a set is surely written in corners.
_LEAVING, _CORNERS = 0.2, 0.99
#: The same by masks: the share of boxes that are the corners of their mask, to a pixel, and are not its XYWH box.
_MASK_CORNERS, _SAME_PIXELS = 0.5, 1.0
#: Deep pictures whose range of values is told; each has to be decoded for it.
_RANGES_TOLD = 3
#: Files of an image folder that are looked through for the one that a json means.
_MOST_FILES = 1_000_000
#: Objects without a mask that are listed one by one; box-only sets have no others.
_LISTED = 1000


@dataclass
class CocoDataset:
    """A checked dataset. Records are sorted by image id, category indices are contiguous in order of json ids.

    Attributes:
        name, json_file, image_root: where it came from.
        records: one :class:`Record` an image, bboxes XYWH as in the json, crowds included (``iscrowd`` 1).
        class_names: names by contiguous index.
        category_ids: json category id by contiguous index.
        sizes: (N, 2) int64 width and height of every image.
        object_counts: (N,) objects that are no crowd, of every image.
        class_counts: (num_classes,) objects that are no crowd.
        crowds: number of crowd regions.
        without_mask: objects without segmentation, which only box training can use.
        maskless: one line for each of these (the first 1000).
        bad: one line for every image and annotation that was dropped.
        notes: one line for every kind of repair.
        has_annotations: False for a test json, which has no ``annotations`` key.
    """

    name: str
    json_file: str
    image_root: str
    records: RecordList
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    sizes: np.ndarray
    object_counts: np.ndarray
    class_counts: np.ndarray
    crowds: int = 0
    without_mask: int = 0
    maskless: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    has_annotations: bool = True

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def summary(self) -> str:
        """What was read, in a few lines for the log."""
        empty = int((self.object_counts == 0).sum())
        lines = [
            f"{self.name}: {len(self)} images, {int(self.object_counts.sum())} objects of {self.num_classes} classes, "
            f"{self.crowds} crowd regions, {empty} images without objects, {len(self.bad)} bad entries dropped "
            f"({self.records.nbytes / 2**20:.1f} MiB in memory)"
        ]
        missing = [name for name, count in zip(self.class_names, self.class_counts) if count == 0]
        if missing and self.object_counts.any():
            lines.append(f"{self.name}: no object of {_some(missing, 5)}")
        lines += [f"{self.name}: {note}" for note in self.notes]
        lines += [f"{self.name}: dropped {entry}" for entry in self.bad]
        if self.bad:
            lines.append(f"{self.name}: {CHECK_HINT}")
        return "\n".join(printable(line, keep="") for line in lines)

    def ground_truth(self) -> dict[str, Any]:
        """The dataset as a COCO dict for evaluation: json category ids, ids renumbered from 1, area and iscrowd set.

        Equal to the file for a file without defects, apart from the annotation ids.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for record in self.records:
            name = os.path.relpath(record["file_name"], self.image_root)
            size = {"height": record["height"], "width": record["width"]}
            images.append({"id": record["image_id"], "file_name": name, **size})
            for a in record["annotations"]:
                entry: dict[str, Any] = {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": self.category_ids[a["category_id"]],
                    "bbox": a["bbox"],
                    "area": a["area"],
                    "iscrowd": a["iscrowd"],
                }
                segmentation = a.get("segmentation")
                if isinstance(segmentation, dict):
                    entry["segmentation"] = segmentation | {"counts": segmentation["counts"].decode("ascii")}
                elif segmentation is not None:
                    entry["segmentation"] = [p.tolist() for p in segmentation]
                annotations.append(entry)
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        return truth if self.has_annotations else {k: v for k, v in truth.items() if k != "annotations"}


def load_coco(
    source: DatasetSource,
    *,
    max_bad: int,
    need_images: bool = True,
    need_annotations: bool = True,
    reader: ImageReader | None = None,
) -> CocoDataset:
    """Read and check one dataset; the generated ``shapes`` sets are made first where they are absent.

    Args:
        source: from :func:`gn_det.data.catalog.datasets_for` or :func:`resolve`.
        max_bad: how many bad images and annotations together may be dropped (DATALOADER.MAX_BAD).
        need_images: check that every image exists and has the size that the json says (headers only).
        need_annotations: refuse a json without ``annotations`` (a test set without ground truth has none).
        reader: reads the images; default: that of a config without INPUT.BIT_DEPTH.

    Raises:
        DataError: one line that names the file, the id or key, and says what to do.
    """
    prepare(source)
    problems = Problems(source.json_file)
    content = read_coco_file(source, problems, need_annotations=need_annotations)
    if need_images:
        unusable = look_at_images(content.images, source, problems, reader=reader)
        content.images = [image for image in content.images if image["id"] not in unusable]
    for image in (i for i in content.images if not i["width"]):
        text = "'width' and 'height' must be positive pixel counts: add them"
        problems.drop("image-entry", text, Where(image["id"], image["file_name"]))
    content.images = [image for image in content.images if image["width"]]
    builder = _Builder(content, source, problems)
    records = RecordList(builder.records())
    builder.reader.refuse_corners()
    bad = problems.bad
    refuse_if_too_many(bad, max_bad, source.json_file)
    return CocoDataset(
        name=source.name,
        json_file=source.json_file,
        image_root=source.image_root,
        records=records,
        class_names=content.class_names,
        category_ids=content.category_ids,
        sizes=np.array([(i["width"], i["height"]) for i in content.images], dtype=np.int64).reshape(-1, 2),
        object_counts=np.array(builder.object_counts, dtype=np.int64),
        class_counts=builder.class_counts,
        crowds=builder.crowds,
        without_mask=builder.without_mask,
        maskless=builder.maskless,
        bad=bad,
        notes=problems.notes(),
        has_annotations=content.has_annotations,
    )


def refuse_if_too_many(bad: Sequence[str], max_bad: int, where: str, *, total: int | None = None) -> None:
    """Raise DataError when more than ``max_bad`` entries (``total`` of them) are bad, quoting the first few."""
    count = len(bad) if total is None else total
    if count > max_bad:
        quoted = "; ".join(bad[:_QUOTED])
        more = f"; and {count - _QUOTED} more" if count > _QUOTED else ""
        raise DataError(
            f"{where}: {count} bad images or annotations, DATALOADER.MAX_BAD allows {max_bad}: {quoted}{more}. Fix "
            f"them ({CHECK_HINT}), or raise DATALOADER.MAX_BAD to drop them"
        )


def check_num_classes(num_classes: int, dataset: CocoDataset) -> int:
    """The number of classes to build: ``num_classes`` if it fits the json, or the json's own number where it is 0.

    Raises:
        DataError: MODEL.ROI_HEADS.NUM_CLASSES differs from the categories of the json.
    """
    if num_classes in (0, dataset.num_classes):
        return dataset.num_classes
    raise DataError(
        f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}, but {dataset.json_file} has {dataset.num_classes} categories "
        f"({_some(dataset.class_names, 5)}): set it to {dataset.num_classes}, or to 0 to take it from the json"
    )


def check_same_classes(datasets: Sequence[CocoDataset]) -> None:
    """Raise DataError unless all datasets have the same class names in the same order."""
    for other in datasets[1:]:
        first = datasets[0]
        if other.class_names == first.class_names:
            continue
        for i in range(max(first.num_classes, other.num_classes)):
            a, b = (d.class_names[i] if i < d.num_classes else "nothing" for d in (first, other))
            if a != b:
                raise DataError(
                    f"{first.json_file} and {other.json_file} have different categories: class {i} (by id) is "
                    f"{shown(a)} in the first and {shown(b)} in the second; give both the same categories"
                )


class AnnotationReader:
    """Turns one json annotation at a time into an :class:`Annotation`, for training and for the check alike."""

    def __init__(self, category_ids: Sequence[int], problems: Problems) -> None:
        self.category_ids = category_ids
        self.index_of = {category: i for i, category in enumerate(category_ids)}
        self.problems = problems
        self._boxes = self._leaving = self._corners = self._masks = self._mask_corners = 0

    def refuse_corners(self) -> None:
        """Report boxes that are [x1, y1, x2, y2].

        Most of them are the corners of their masks; or many leave their images as XYWH, and all fit as corners.
        """
        leaving = self._leaving >= max(2, _LEAVING * self._boxes) and self._corners >= _CORNERS * self._boxes
        if self._mask_corners >= max(2, _MASK_CORNERS * self._masks):
            why = f"{self._mask_corners} of {self._masks} boxes are the corners of their masks"
        elif leaving:
            why = (
                f"{self._leaving} of {self._boxes} boxes leave their image as they are, {self._corners} fit as corners"
            )
        else:
            return
        self.problems.refuse(
            "bbox-corners",
            f"boxes are written as [x1, y1, x2, y2], COCO boxes are [x, y, width, height]: {why}: write "
            f"[x1, y1, x2 - x1, y2 - y1], as gn-det check --fix does",
        )

    def read(self, raw: dict[str, Any], image: dict[str, Any]) -> Annotation | None:
        """The annotation with a contiguous category; None where it is dropped, which ``problems`` is told."""
        where = Where(image["id"], image["file_name"], raw.get("id"))
        try:
            return self._read(raw, image["height"], image["width"], where)
        except Defect as defect:
            self.problems.drop(defect.kind, str(defect), where)
            return None

    def _read(self, raw: dict[str, Any], height: int, width: int, where: Where) -> Annotation:
        given = raw.get("category_id")
        category = given if type(given) is int and given in self.index_of else resolve_id(given, self.index_of)
        if category is None:
            known = _some([str(c) for c in self.category_ids], 5)
            raise Defect("category-unknown", f"category_id {shown(given)} is not in the json's categories ({known})")
        if type(given) is not int:
            what = "ids are written as floats or as text: read as whole numbers"
            self.problems.repair("id-type", what, where)
        if raw.get("ignore"):
            text = "'ignore' is not part of COCO's instances format: mark regions to ignore with iscrowd 1"
            raise Defect("ignore", text)
        iscrowd = raw.get("iscrowd")
        if iscrowd is not None and iscrowd not in (0, 1):
            raise Defect("iscrowd", f"iscrowd {shown(iscrowd)} is not 0 or 1")
        bbox, unusable = raw.get("bbox"), None
        if bbox is not None:
            try:
                bbox = check_box(bbox, height, width)
            except Defect as defect:
                if not raw.get("segmentation"):
                    raise
                unusable = defect
        segmentation, left_out = check_segmentation(raw.get("segmentation"), height, width)
        if bbox is None or unusable is not None:
            bbox = self._box_of(segmentation, height, width, where, unusable)
        elif not iscrowd:
            self._count_corners(bbox, segmentation, height, width)
        if iscrowd is None:
            self.problems.repair("iscrowd-missing", "annotations have no iscrowd: taken as 0", where)
        if left_out:
            what = "polygon pieces have fewer than 3 points or an odd number of coordinates: left out"
            self.problems.repair("polygon-piece", what, where, left_out)
        area: Any = raw.get("area")
        empty = segmentation is not None and covers_no_pixel(segmentation, height, width)
        if empty:
            what = "masks cover no pixel of their image: nothing of them can be learnt, gn-det check lists them"
            self.problems.repair("polygon-empty", what, where)
        if not is_number(area) or area < 0 or (area == 0 and not empty):
            what = "annotations have no usable area: computed from mask or box"
            self.problems.repair("area-missing", what, where)
            area = float(bbox[2] * bbox[3]) if segmentation is None else mask_area(segmentation, height, width)
        index = self.index_of[category]
        annotation = Annotation(id=raw["id"], bbox=bbox, category_id=index, iscrowd=int(iscrowd or 0), area=area)
        if segmentation is not None:
            annotation["segmentation"] = segmentation
        return annotation

    def _box_of(self, segmentation: Any, height: int, width: int, where: Where, unusable: Defect | None) -> list[float]:
        """The box of the mask, in place of one that is missing or ``unusable``."""
        if segmentation is None:
            raise Defect("bbox-format", "bbox is missing, and there is no mask to take it from: add it")
        if unusable is not None and covers_no_pixel(segmentation, height, width):
            raise unusable
        try:
            x0, y0, x1, y1 = mask_box(segmentation)
            box = check_box([x0, y0, x1 - x0, y1 - y0], height, width)
        except Defect as defect:
            raise unusable or defect from None
        if unusable is None:
            self.problems.repair("bbox-missing", "annotations have no bbox: computed from the mask", where)
        else:
            what = "annotations have a bbox without area, outside the image or of no numbers: computed from the mask"
            self.problems.repair("bbox-unusable", what, where)
        return box

    def _count_corners(self, bbox: Sequence[float], segmentation: Any, height: int, width: int) -> None:
        x, y, w, h = bbox
        self._boxes += 1
        # Tools are off by a few pixels at the border; this is far more.
        self._leaving += x + w > 1.1 * width + 1 or y + h > 1.1 * height + 1
        self._masks += segmentation is not None
        if 0 <= x < w <= width + 1 and 0 <= y < h <= height + 1:
            self._corners += 1
            if segmentation is not None:  # few boxes come here by chance
                self._mask_corners += _is_corners(bbox, mask_box(segmentation))


def fits_as_written(bbox: Sequence[float], mask: Sequence[float]) -> bool:
    """Whether the XYWH ``bbox`` is the XYXY box of its mask, to a pixel."""
    x, y, w, h = bbox
    return max(abs(a - b) for a, b in zip((x, y, x + w, y + h), mask)) <= _SAME_PIXELS


def _is_corners(bbox: Sequence[float], mask: Sequence[float]) -> bool:
    """Whether ``bbox`` is its mask's box as [x1, y1, x2, y2], and is not as XYWH."""
    fits = max(abs(a - b) for a, b in zip(bbox, mask)) <= _SAME_PIXELS
    return fits and not fits_as_written(bbox, mask)


class _Builder:
    """Turns json entries into records one by one, counting on the way."""

    def __init__(self, content: CocoFile, source: DatasetSource, problems: Problems) -> None:
        self.content = content
        self.root = source.image_root
        self.reader = AnnotationReader(content.category_ids, problems)
        self.object_counts: list[int] = []
        self.class_counts = np.zeros(len(content.category_ids), dtype=np.int64)
        self.crowds = self.without_mask = 0
        self.maskless: list[str] = []

    def records(self) -> Iterable[Record]:
        for image in self.content.images:
            annotations = []
            for raw in self.content.annotations_of.get(image["id"], ()):
                annotation = self.reader.read(raw, image)
                if annotation is not None:
                    annotations.append(annotation)
                    self._count(annotation, image)
            objects = [a["category_id"] for a in annotations if not a["iscrowd"]]
            self.object_counts.append(len(objects))
            np.add.at(self.class_counts, objects, 1)
            yield Record(
                file_name=os.path.join(self.root, image["file_name"]),
                height=image["height"],
                width=image["width"],
                image_id=image["id"],
                annotations=annotations,
            )

    def _count(self, annotation: Annotation, image: dict[str, Any]) -> None:
        self.crowds += annotation["iscrowd"]
        if "segmentation" not in annotation and not annotation["iscrowd"]:
            self.without_mask += 1
            if len(self.maskless) < _LISTED:
                where = Where(image["id"], image["file_name"], annotation["id"])
                self.maskless.append(f"{where} {NO_MASK}")


#: What is wrong with an object without a mask, where masks are trained.
NO_MASK = "has no segmentation: add it"


def look_at_images(
    images: Sequence[dict[str, Any]],
    source: DatasetSource,
    problems: Problems,
    step: Callable[[], object] | None = None,
    reader: ImageReader | None = None,
) -> set[Any]:
    """Ids of images that are missing, no images, or of another size than the json says (headers only).

    A size that the json lacks, and a name that differs from the only file it can mean in how it is written, are
    corrected in ``images``.

    Args:
        images: of :class:`CocoFile`.
        source: where they are.
        problems: is told of each, and refuses the set where no image can be used.
        step: called after each image.
        reader: as the images are going to be read.
    """
    reader = reader or ImageReader()
    root = Path(source.image_root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        problems.stop(
            "image-folder",
            f"{root}: the image folder of {source.json_file} {what}: check {source.origin or 'the path'}",
        )
    if len(images) > _MANY_IMAGES:
        logger.info("%s: checking the headers of %d images", source.name, len(images))
    unusable: dict[Any, tuple[str, str]] = {}
    names = _NearNames(source.image_root, images)
    deep = 0
    with warnings.catch_warnings(), ThreadPoolExecutor(_HEADER_THREADS) as pool:
        # Pillow warns of odd metadata and very large pictures; neither is a mistake of the dataset.
        warnings.simplefilter("ignore")
        for image, found in zip(images, pool.map(lambda i: _header_problem(i, source, reader), images)):
            if step is not None:
                step()
            where = Where(image["id"], image["file_name"])
            if isinstance(found, ImageProblem) and found.kind == "image-missing":
                found = _by_other_name(image, source, reader, names, problems) or found
            if isinstance(found, ImageProblem):
                if found.kind == "image-depth" and (deep := deep + 1) <= _RANGES_TOLD:
                    found = ImageProblem(found.kind, values_in_words(_path(image, source)))
                problems.drop(found.kind, found.text, where)
                unusable.setdefault(image["id"], (found.kind, in_words(where, found.text)))
            elif not image["width"]:
                image["width"], image["height"] = found
                what = "images have no usable width and height: taken from the files"
                problems.repair("image-no-size", what, where)
    if images and len(unusable) == len(images):
        kind, first = next(iter(unusable.values()))
        text = f"none of its {len(images)} images can be used from {source.image_root} (first: {first})"
        if kind not in ("image-depth", "image-large") or any(k != kind for k, _ in unusable.values()):
            text += f": check {source.origin or 'the image folder'}"
        problems.refuse("image-folder", text)
    return set(unusable)


class ImageProblem(NamedTuple):
    """What is wrong with an image file: a key of ``problems.KINDS``, and in words."""

    kind: str
    text: str


class _NearNames:
    """Finds the file that a name means which is written with another slash, letter case, Unicode form or escape."""

    def __init__(self, root: str, images: Sequence[dict[str, Any]]) -> None:
        self._root, self._images = root, images
        self._files: dict[str, list[str]] | None = None
        self._named: set[str] = set()

    def find(self, name: str) -> list[str]:
        """Files that ``name`` may mean, relative to the folder; none that another image of the json names."""
        if self._files is None:
            self._named = {os.path.normpath(image["file_name"]) for image in self._images}
            self._files = {}
            for path in itertools.islice(self._walk(), _MOST_FILES):
                self._files.setdefault(_plain_name(path), []).append(path)
        return [path for path in self._files.get(_plain_name(name), ()) if path not in self._named]

    def _walk(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._root):
            for name in files:
                yield os.path.relpath(os.path.join(folder, name), self._root)


def _plain_name(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(unquote(name.replace("\\", "/")))).casefold()


def _by_other_name(
    image: dict[str, Any], source: DatasetSource, reader: ImageReader, names: _NearNames, problems: Problems
) -> ImageProblem | tuple[int, int] | None:
    """Take the only file that the name of a missing image can mean; None where there is none."""
    given = image["file_name"]
    near = names.find(given)
    if len(near) > 1:
        several = ", ".join(one_line(name) for name in near[:3])
        text = f"{one_line(given, 300)}: image not found, and it may mean {several}: correct file_name"
        return ImageProblem("image-missing", text)
    if not near:
        return None
    image["file_name"] = near[0]
    what = "file names differ from the files in slash, letter case, Unicode form or %-escape: the files are taken"
    problems.repair("image-name", what, Where(image["id"], given))
    return _header_problem(image, source, reader)


def _path(image: dict[str, Any], source: DatasetSource) -> str:
    return os.path.join(source.image_root, image["file_name"])


def _header_problem(
    image: dict[str, Any], source: DatasetSource, reader: ImageReader
) -> ImageProblem | tuple[int, int]:
    """What is wrong with one image file; its width and height where nothing is."""
    path = _path(image, source)
    try:
        size = reader.size(path)
    except ImageError as error:
        slashes = image["file_name"].replace("\\", "/")
        beside = os.path.join(source.image_root, os.path.basename(slashes))
        hint = ""
        if beside != path and os.path.exists(beside):
            hint = f"; there is {one_line(beside, 300)}: correct file_name"
        elif slashes != image["file_name"] and error.kind == "image-missing":
            hint = "; a backslash in file_name separates folders on Windows only: write a forward slash"
        return ImageProblem(error.kind, f"{error}{hint}")
    expected = (image["width"], image["height"])
    if size == expected or not image["width"]:
        return size
    return ImageProblem("image-size", wrong_size(path, size, expected))


def wrong_size(path: str, size: tuple[int, int], expected: tuple[int, int]) -> str:
    """What to say where a picture of (width, height) ``size`` should have the size ``expected``."""
    turned = size[::-1] == expected
    hint = "the sides are swapped (EXIF orientation is applied when reading); " if turned else ""
    path = one_line(path, 300)
    return (
        f"{path} is {size[0]}x{size[1]} pixels, the json says {expected[0]}x{expected[1]}: {hint}correct "
        f"width and height and the annotations"
    )


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(one_line(name, 60) for name in names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
