"""Read and check a COCO-format json as a compact :class:`CocoDataset`.

A file that is ambiguous as a whole (no categories, repeated image ids ...) is refused at once. Single bad annotations
and images are listed and dropped, up to ``DATALOADER.MAX_BAD`` of them; more is a systematic mistake, and also refused.
What can be repaired without guessing is repaired in memory and noted in the summary: missing ``area`` or ``iscrowd``;
ids that are missing, 0, repeated or written as 77.0; sizes known from the image files; boxes known from the masks; file
names that differ only in spelling from the one matching file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from msgspec.structs import asdict

from gn_det.data.annotation_table import AnnotationTable, check_annotations, image_sizes, refuse_corners
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco_json import CocoJson, collector_paused, read_coco_json
from gn_det.data.image import ImageReader
from gn_det.data.image_files import look_at_images
from gn_det.data.problems import Problem, Problems, Where
from gn_det.data.records import RecordList
from gn_det.data.shapes import prepare
from gn_det.errors import DataError
from gn_det.text import count, printable, shown, some

#: Ends every message about dropped or refused entries.
CHECK_HINT = "gn-det check lists all of them, and --fix writes a copy without them"

#: How many messages a refusal quotes; the log has all of them.
_QUOTED = 3
#: How many objects without a mask are listed one by one; in box-only sets that is every object.
_LISTED = 1000


@dataclass
class CocoDataset:
    """A checked dataset. Records are sorted by image id; category indices are contiguous, in the order of json ids."""

    name: str  # of the source, as are the next two
    json_file: str
    image_root: str
    records: RecordList  # one :class:`Record` per image, bboxes XYWH as in the json, crowds included (``iscrowd`` 1)
    class_names: tuple[str, ...]  # names by contiguous index
    category_ids: tuple[int, ...]  # json category id by contiguous index
    sizes: np.ndarray  # (N, 2) int64 width and height of every image
    object_images: np.ndarray  # (M,) int64 image index of every non-crowd object
    object_classes: np.ndarray  # (M,) int64
    object_sizes: np.ndarray  # (M, 2) float32 width and height of their boxes in pixels, at most 1e9
    crowd_images: np.ndarray  # the same for crowd regions
    crowd_classes: np.ndarray
    without_mask: int = 0  # objects without segmentation, which only box training can use
    maskless: list[str] = field(default_factory=list)  # one line for each of them (the first 1000)
    bad: list[str] = field(default_factory=list)  # one line for each dropped image and annotation
    notes: list[str] = field(default_factory=list)  # one line for each kind of repair
    has_annotations: bool = True  # False for a test json, which has no ``annotations`` key

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def crowds(self) -> int:
        """Number of crowd regions."""
        return len(self.crowd_images)

    @property
    def object_counts(self) -> np.ndarray:
        """(N,) non-crowd objects per image."""
        return np.bincount(self.object_images, minlength=len(self))

    @property
    def class_counts(self) -> np.ndarray:
        """(num_classes,) non-crowd objects per class."""
        return np.bincount(self.object_classes, minlength=self.num_classes)

    def summary(self) -> str:
        """Summarize what was read in a few log lines."""
        classes = count(self.num_classes, "class", "classes")
        lines = [f"{count(len(self), 'image')}, {count(len(self.object_images), 'object')} of {classes}"]
        empty = int((self.object_counts == 0).sum())
        lines[0] += f", {count(self.crowds, 'crowd region')}" if self.crowds else ""
        lines[0] += f", {count(empty, 'image')} without objects" if empty else ""
        lines[0] += f", {count(len(self.bad), 'bad entry', 'bad entries')} dropped" if self.bad else ""
        missing = [name for name, number in zip(self.class_names, self.class_counts) if number == 0]
        if missing and len(self.object_images):
            lines.append(f"no object of {some(missing)}")
        lines += [*self.notes, *(f"dropped {entry}" for entry in self.bad)]
        if self.bad:
            lines.append(CHECK_HINT)
        return "\n".join(printable(f"{self.name}: {line}", keep="") for line in lines)

    def ground_truth(self) -> dict[str, Any]:
        """Return a COCO dict for evaluation: json category ids, ids renumbered from 1, area and iscrowd set.

        For a file without defects it equals the file, apart from the annotation ids.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            (name, height, width, number), entries = self.records.entries(index)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for entry in entries:
                a = {**asdict(entry), "id": len(annotations) + 1, "image_id": number}
                if not entry.segmentation:
                    del a["segmentation"]
                annotations.append(a)
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        return truth if self.has_annotations else {k: v for k, v in truth.items() if k != "annotations"}


def load_coco(
    source: DatasetSource,
    *,
    max_bad: int,
    need_annotations: bool = True,
    reader: ImageReader | None = None,
) -> CocoDataset:
    """Read and check one dataset; generate a missing ``shapes`` set first.

    Args:
        source: from :func:`gn_det.data.catalog.datasets_for` or :func:`resolve`.
        max_bad: how many bad images and annotations may be dropped in total (DATALOADER.MAX_BAD).
        need_annotations: refuse a json without ``annotations`` (a test set without ground truth has none).
        reader: reads the images; default: one without INPUT.BIT_DEPTH.

    Raises:
        DataError: one line that names the file and the id or key, and says what to do.
    """
    prepare(source)
    problems = Problems(source.json_file)
    with collector_paused():
        content = read_coco_json(source, problems, need_annotations=need_annotations)
        unusable = look_at_images(content.images, source, problems, reader=reader)
        table = check_annotations(content, [i for i in content.images if i["id"] not in unusable], problems)
        refuse_corners(table, problems)
        refuse_if_too_many(problems.bad, max_bad, source.json_file)
        dataset = build_dataset(source, content, table)
    dataset.bad, dataset.notes = problems.bad, problems.notes()
    return dataset


def build_dataset(source: DatasetSource, content: CocoJson, table: AnnotationTable) -> CocoDataset:
    """Build the dataset from the images and annotations of ``table``."""
    records = RecordList(
        source.image_root,
        content.category_ids,
        [(i["file_name"], i["height"], i["width"], i["id"]) for i in table.images],
        table.bounds(),
        content.entries.text,
        table.spans,
    )
    objects, crowds = table[~table.crowd], table[table.crowd]
    maskless = objects[~objects.has_mask]
    where = ((objects.images[i], a) for i, a in zip(maskless.image[:_LISTED].tolist(), maskless.id.tolist()))
    return CocoDataset(
        name=source.name,
        json_file=source.json_file,
        image_root=source.image_root,
        records=records,
        class_names=content.class_names,
        category_ids=content.category_ids,
        sizes=image_sizes(table.images),
        object_images=objects.image,
        object_classes=objects.category,
        object_sizes=objects.bbox[:, 2:].clip(max=1e9).astype(np.float32),
        crowd_images=crowds.image,
        crowd_classes=crowds.category,
        without_mask=len(maskless),
        maskless=[str(Problem("no-mask", Where(i["id"], i["file_name"], a))) for i, a in where],
        has_annotations=content.has_annotations,
    )


def refuse_if_too_many(bad: Sequence[str], max_bad: int, where: str, *, total: int | None = None) -> None:
    """Raise DataError if more than ``max_bad`` entries (of ``total``) are bad, quoting the first few."""
    number = len(bad) if total is None else total
    if number > max_bad:
        quoted = "; ".join(bad[:_QUOTED])
        more = f"; and {number - _QUOTED} more" if number > _QUOTED else ""
        raise DataError(
            f"{where}: {number} bad images or annotations, DATALOADER.MAX_BAD allows {max_bad}: {quoted}{more}. Fix "
            f"them ({CHECK_HINT}), or raise DATALOADER.MAX_BAD to drop them"
        )


def check_num_classes(num_classes: int, dataset: CocoDataset) -> None:
    """Raise DataError unless MODEL.ROI_HEADS.NUM_CLASSES is 0 or the number of categories of the json."""
    if num_classes not in (0, dataset.num_classes):
        raise DataError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}, but {dataset.json_file} has {dataset.num_classes} "
            f"categories ({some(dataset.class_names)}): set it to {dataset.num_classes}, or to 0 to take it from the "
            "json"
        )


def check_same_classes(datasets: Sequence[CocoDataset]) -> None:
    """Raise DataError unless all datasets have the same class names in the same order."""
    for other in datasets[1:]:
        first = datasets[0]
        for i, (a, b) in enumerate(zip_longest(first.class_names, other.class_names, fillvalue="nothing")):
            if a != b:
                raise DataError(
                    f"{first.json_file} and {other.json_file} have different categories: class {i} (by id) is "
                    f"{shown(a)} in the first and {shown(b)} in the second; give both the same categories"
                )


def check_trainable(cfg: Any, datasets: Sequence[CocoDataset]) -> np.ndarray:
    """Check that the sets can be trained on with ``cfg``, before a model is built or a file is written.

    Returns:
        (N,) bool: whether each image has objects, for the images of all sets in order.

    Raises:
        DataError: no image with objects, different classes, or no masks where MODEL.MASK_ON needs them.
    """
    check_same_classes(datasets)
    for dataset in datasets if cfg.MODEL.MASK_ON else ():
        check_masks(dataset, int(cfg.DATALOADER.MAX_BAD))
    return check_objects(datasets)


def check_objects(datasets: Sequence[CocoDataset]) -> np.ndarray:
    """(N,) bool: whether each image of all sets has objects; refuses sets without any."""
    has_objects = np.concatenate([d.object_counts > 0 for d in datasets] or [np.zeros(0, dtype=bool)])
    if not has_objects.any():
        names = ", ".join(d.json_file for d in datasets) or "DATASETS.TRAIN"
        dropped = [entry for d in datasets for entry in d.bad]
        why = f"; {len(dropped)} bad entries were dropped, such as {dropped[0]} ({CHECK_HINT})" if dropped else ""
        crowds = sum(d.crowds for d in datasets)
        if crowds:
            raise DataError(
                f"{names}: all {crowds} objects are crowds (iscrowd 1), which are never trained on: set iscrowd 0 for "
                f"single objects, with an RLE mask, too{why}"
            )
        raise DataError(f"{names}: no image has an object to learn from: check the annotations{why}")
    return has_objects


def check_masks(dataset: CocoDataset, max_bad: int) -> None:
    """When masks are trained, count objects without one as bad: a few are dropped, many are refused."""
    if dataset.without_mask == 0:
        return
    if dataset.without_mask == len(dataset.object_images):
        raise DataError(
            f"{dataset.json_file}: none of its {dataset.without_mask} objects has a segmentation: add masks, or train "
            f"boxes only with MODEL.MASK_ON False"
        )
    bad = [*dataset.maskless, *dataset.bad]
    where = f"{dataset.json_file} with MODEL.MASK_ON True"
    refuse_if_too_many(bad, max_bad, where, total=dataset.without_mask + len(dataset.bad))
