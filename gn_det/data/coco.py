"""COCO-format json to :class:`CocoDataset`: read, checked, compact.

Structure that makes the file as a whole ambiguous (no categories, repeated image ids ...) is refused at once. Single
bad annotations and images are listed and dropped, up to ``DATALOADER.MAX_BAD`` of them; more than that is a sign of a
systematic mistake and refused, too. What can be repaired without guessing (no ``area``, no ``iscrowd``, ids that are
missing, 0 or repeated) is repaired in memory and noted in the summary.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gn_det.data.catalog import DatasetSource, prepare
from gn_det.data.checks import Defect, as_other_type, check_box, check_segmentation, is_number
from gn_det.data.coco_file import CocoFile, read_coco_file
from gn_det.data.image import ImageError, image_size
from gn_det.data.problems import Problems, Where, in_words
from gn_det.data.records import Annotation, Record, RecordList
from gn_det.errors import DataError

logger = logging.getLogger(__name__)

#: What every message about dropped or refused entries ends with.
CHECK_HINT = "gn-det check lists all of them, and --fix writes a copy without them"

#: How many messages a refusal quotes; all of them are in the log.
_QUOTED = 3
_HEADER_THREADS = 8
#: From so many images on, the log says that they are being looked at: it takes a while.
_MANY_IMAGES = 20_000
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
        return "\n".join(lines)

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
        return {"images": images, "annotations": annotations, "categories": categories}


def load_coco(
    source: DatasetSource, *, max_bad: int, need_images: bool = True, need_annotations: bool = True
) -> CocoDataset:
    """Read and check one dataset; the generated ``shapes`` sets are made first where they are absent.

    Args:
        source: from :func:`gn_det.data.catalog.datasets_for` or :func:`resolve`.
        max_bad: how many bad images and annotations together may be dropped (DATALOADER.MAX_BAD).
        need_images: check that every image exists and has the size that the json says (headers only).
        need_annotations: refuse a json without ``annotations`` (a test set without ground truth has none).

    Raises:
        DataError: one line that names the file, the id or key, and says what to do.
    """
    prepare(source)
    problems = Problems(source.json_file)
    content = read_coco_file(source, problems, need_annotations=need_annotations)
    if need_images:
        unusable = look_at_images(content.images, source, problems)
        content.images = [image for image in content.images if image["id"] not in unusable]
    builder = _Builder(content, source, problems)
    records = RecordList(builder.records())
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
                    f"{a!r} in the first and {b!r} in the second; give both the same categories"
                )


class AnnotationReader:
    """Turns one json annotation at a time into an :class:`Annotation`, for training and for the check alike."""

    def __init__(self, category_ids: Sequence[int], problems: Problems) -> None:
        self.category_ids = category_ids
        self.index_of = {category: i for i, category in enumerate(category_ids)}
        self.problems = problems

    def read(self, raw: dict[str, Any], image: dict[str, Any]) -> Annotation | None:
        """The annotation with a contiguous category; None where it is dropped, which ``problems`` is told."""
        where = Where(image["id"], image["file_name"], raw.get("id"))
        try:
            return self._read(raw, image["height"], image["width"], where)
        except Defect as defect:
            self.problems.drop(defect.kind, str(defect), where)
            return None

    def _read(self, raw: dict[str, Any], height: int, width: int, where: Where) -> Annotation:
        category = raw.get("category_id")
        if not isinstance(category, int) or category not in self.index_of:
            known = _some([str(c) for c in self.category_ids], 5)
            what = as_other_type(category, self.index_of)
            text = f"category_id {category!r} is not in the json's categories ({known}){what and ': ' + what}"
            raise Defect("category-unknown", text)
        if raw.get("ignore"):
            text = "'ignore' is not part of COCO's instances format: mark regions to ignore with iscrowd 1"
            raise Defect("ignore", text)
        iscrowd = raw.get("iscrowd")
        if iscrowd is not None and iscrowd not in (0, 1):
            raise Defect("iscrowd", f"iscrowd {iscrowd!r} is not 0 or 1")
        bbox = check_box(raw.get("bbox"), height, width)
        segmentation, left_out = check_segmentation(raw.get("segmentation"), height, width)
        if iscrowd is None:
            self.problems.repair("iscrowd-missing", "annotations have no iscrowd: taken as 0", where)
        if left_out:
            what = "polygon pieces have fewer than 3 points or an odd number of coordinates: left out"
            self.problems.repair("polygon-piece", what, where, left_out)
        area: Any = raw.get("area")
        if not is_number(area) or area < 0:
            what = "annotations have no usable area: computed from mask or box"
            self.problems.repair("area-missing", what, where)
            area = _area(segmentation, bbox, height, width)
        index = self.index_of[category]
        annotation = Annotation(id=raw["id"], bbox=bbox, category_id=index, iscrowd=int(iscrowd or 0), area=area)
        if segmentation is not None:
            annotation["segmentation"] = segmentation
        return annotation


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


def _area(segmentation: Any, bbox: Sequence[float], height: int, width: int) -> float:
    from pycocotools import mask as coco_mask

    if segmentation is None:
        return float(bbox[2] * bbox[3])
    if isinstance(segmentation, dict):
        return float(coco_mask.area(segmentation))
    rles = coco_mask.frPyObjects([p.tolist() for p in segmentation], height, width)
    return float(coco_mask.area(coco_mask.merge(rles)))


def look_at_images(
    images: Sequence[dict[str, Any]],
    source: DatasetSource,
    problems: Problems,
    step: Callable[[], object] | None = None,
) -> set[Any]:
    """Ids of images that are missing, no images, or of another size than the json says (headers only).

    Args:
        images: of :class:`CocoFile`.
        source: where they are.
        problems: is told of each, and refuses the set where no image can be used.
        step: called after each image.
    """
    root = Path(source.image_root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        problems.stop(
            "image-folder",
            f"{root}: the image folder of {source.json_file} {what}: check {source.origin or 'the path'}",
        )
    if len(images) > _MANY_IMAGES:
        logger.info("%s: checking the headers of %d images", source.name, len(images))
    unusable: dict[Any, str] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(_HEADER_THREADS) as pool:
        # Pillow warns of odd metadata and very large pictures; neither is a mistake of the dataset.
        warnings.simplefilter("ignore")
        for image, found in zip(images, pool.map(lambda i: _header_problem(i, source), images)):
            if step is not None:
                step()
            if found is not None:
                where = Where(image["id"], image["file_name"])
                problems.drop(*found, where)
                unusable.setdefault(image["id"], in_words(where, found[1]))
    if images and len(unusable) == len(images):
        first = next(iter(unusable.values()))
        problems.refuse(
            "image-folder",
            f"none of its {len(images)} images can be used from {source.image_root} (first: {first}): check "
            f"{source.origin or 'the image folder'}",
        )
    return set(unusable)


def _header_problem(image: dict[str, Any], source: DatasetSource) -> tuple[str, str] | None:
    """(kind, text) of what is wrong with one image file."""
    path = os.path.join(source.image_root, image["file_name"])
    try:
        width, height = image_size(path)
    except ImageError as error:
        beside = os.path.join(source.image_root, os.path.basename(image["file_name"]))
        hint = f"; there is {beside}: correct file_name" if beside != path and os.path.exists(beside) else ""
        return error.kind, f"{error}{hint}"
    if (width, height) == (image["width"], image["height"]):
        return None
    return "image-size", wrong_size(path, (width, height), (image["width"], image["height"]))


def wrong_size(path: str, size: tuple[int, int], expected: tuple[int, int]) -> str:
    """What to say where a picture of (width, height) ``size`` should have the size ``expected``."""
    turned = size[::-1] == expected
    hint = "the sides are swapped (EXIF orientation is applied when reading); " if turned else ""
    return (
        f"{path} is {size[0]}x{size[1]} pixels, the json says {expected[0]}x{expected[1]}: {hint}correct width and "
        f"height and the annotations"
    )


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
