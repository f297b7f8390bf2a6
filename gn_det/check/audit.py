"""One dataset read for ``gn-det check``: every problem that the loader knows, and some that it does not mind.

Images and annotations go through the very functions that training uses, with a reporter that never stops. On what they
accept, this module looks for more: boxes that do not fit their masks, objects annotated twice, objects too small to
see. One pass, no copy of the annotations: what is kept of an object are a few numbers.
"""

from __future__ import annotations

import gc
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gn_det.check.decode import DecodeJob, decode_all
from gn_det.check.findings import Findings
from gn_det.data.catalog import DatasetSource, prepare
from gn_det.data.checks import mask_box
from gn_det.data.coco import NO_MASK, AnnotationReader, CocoDataset, look_at_images
from gn_det.data.coco_file import CocoFile, parse, structure
from gn_det.data.image import ImageReader
from gn_det.data.problems import KINDS, Caps, FileProblem, Where
from gn_det.data.records import Annotation, RecordList
from gn_det.data.transforms import resized_shape

#: An edge of a box may be off its mask by this many pixels, or by this part of the longer side.
_FIT_PIXELS, _FIT_PART = 3.0, 0.1
#: What boxes that are corners look like one by one.
_OF_CORNERS = ("bbox-mask", "bbox-reaches-out")
#: What the box or its part inside the image has to measure at training size, in pixels.
VISIBLE = 1.0


@dataclass(frozen=True)
class Training:
    """What the check needs to know of a config.

    Attributes:
        short_sides: shorter sides that images are resized to (INPUT.MIN_SIZE_TRAIN), 0 for no resize.
        max_size: INPUT.MAX_SIZE_TRAIN.
        masks_on: MODEL.MASK_ON.
        reader: reads images as training does.
        caps: on the number of detections.
    """

    short_sides: tuple[int, ...]
    max_size: int
    masks_on: bool
    reader: ImageReader = field(default_factory=ImageReader)
    caps: Caps = field(default_factory=Caps)

    @classmethod
    def of(cls, cfg: Any) -> Training:
        sides = cfg.INPUT.MIN_SIZE_TRAIN
        sides = (sides,) if isinstance(sides, int) else tuple(sides)
        return cls(sides, int(cfg.INPUT.MAX_SIZE_TRAIN), bool(cfg.MODEL.MASK_ON), ImageReader.of(cfg), Caps.of(cfg))

    def scale(self, width: int, height: int, side: int) -> tuple[float, float]:
        """Factors in x and y of ResizeShortestEdge."""
        if side == 0:
            return 1.0, 1.0
        new_height, new_width = resized_shape(height, width, side, self.max_size)
        return new_width / width, new_height / height


@dataclass
class Objects:
    """Numbers of all objects that are no crowd, one entry each: box sides in pixels, class, and image index."""

    widths: array[float] = field(default_factory=lambda: array("f"))
    heights: array[float] = field(default_factory=lambda: array("f"))
    classes: array[int] = field(default_factory=lambda: array("l"))
    images: array[int] = field(default_factory=lambda: array("l"))


@dataclass
class Survey:
    """What is known of one dataset after reading it.

    Attributes:
        source, split: which set; ``split`` is "train" or "val".
        reader: reads its images as training does.
        findings: everything that is wrong.
        dataset: counts and classes as :func:`load_coco` gives them, without records; None where nothing could be read.
        data: the parsed json, for samples and ``--fix``; None where it is no json.
        content: its checked structure.
        images: usable images, entries of ``content.images``.
        objects: sizes, classes and images of the objects, the index being that into ``images``.
        digests: content hash by image id, where every image was decoded.
        decoded: whether every image was decoded.
    """

    source: DatasetSource
    split: str
    findings: Findings
    reader: ImageReader = field(default_factory=ImageReader)
    dataset: CocoDataset | None = None
    data: dict[str, Any] | None = None
    content: CocoFile | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    objects: Objects = field(default_factory=Objects)
    digests: dict[Any, bytes] = field(default_factory=dict)
    decoded: bool = False

    def path(self, image: dict[str, Any]) -> str:
        """The file of an image."""
        return os.path.join(self.source.image_root, image["file_name"])


def survey(
    source: DatasetSource, split: str, training: Training, *, decode: bool = False, progress: bool = False
) -> Survey:
    """Read one set and write down all that is wrong with it; raises nothing for what a set can have wrong.

    Args:
        source: the set; generated sets are made first.
        split: "train", or "val" where annotations may be missing.
        training: from the config.
        decode: decode every image, on all cores.
        progress: show progress bars on stderr.
    """
    prepare(source)
    with _collector_paused():
        return _survey(Survey(source, split, Findings(source.json_file), training.reader), training, decode, progress)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Millions of lists without a cycle among them: looking for cycles takes a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _survey(result: Survey, training: Training, decode: bool, progress: bool) -> Survey:
    source, split = result.source, result.split
    findings = result.findings
    try:
        result.data = parse(source, findings)
        result.content = structure(result.data, findings, need_annotations=split == "train")
    except FileProblem as problem:
        findings.add_file_problem(problem)
        return result
    unusable = _look_at_images(result, training, decode, progress)
    result.images = [image for image in result.content.images if image["id"] not in unusable]
    _read_annotations(result, training, unusable, progress)
    _look_at_the_whole(result)
    return result


def _look_at_images(result: Survey, training: Training, decode: bool, progress: bool) -> set[Any]:
    """Ids of unusable images; none where no image at all can be used, which is one mistake and not thousands."""
    assert result.content is not None
    images, source, findings = result.content.images, result.source, result.findings
    try:
        with Bar(progress, len(images), f"{result.split}: image headers") as step:
            unusable = look_at_images(images, source, findings, step, training.reader)
    except FileProblem as problem:
        findings.add_file_problem(problem)
        return set()
    if len(unusable) == len(images):
        return set()
    if decode:
        left = [image for image in images if image["id"] not in unusable]
        jobs = [DecodeJob(result.path(i), i["width"], i["height"], training.reader) for i in left]
        with Bar(progress, len(jobs), f"{result.split}: decoding") as step:
            for image, decoded in zip(left, decode_all(jobs)):
                step()
                where = Where(image["id"], image["file_name"])
                if decoded.kind and KINDS[decoded.kind].severity == "error":
                    findings.drop(decoded.kind, decoded.text, where)
                    unusable.add(image["id"])
                elif decoded.kind:
                    findings.add(decoded.kind, decoded.text, where)
                result.digests[image["id"]] = decoded.digest
        result.decoded = True
    return unusable


def _read_annotations(result: Survey, training: Training, unusable: set[Any], progress: bool) -> None:
    """All annotations of all images; those of unusable images are looked at, but not counted."""
    assert result.content is not None
    content, findings = result.content, result.findings
    reader = AnnotationReader(content.category_ids, findings)
    object_counts: list[int] = []
    capped: list[tuple[Where, int, int]] = []
    crowds = without_mask = 0
    with Bar(progress, len(content.images), f"{result.split}: annotations") as step:
        for image in content.images:
            step()
            if findings.dropped_images.get(image["id"]) == "image-size":
                continue  # which of the two sizes its annotations mean is not known
            if not image["width"]:
                continue  # neither the json nor the file has a size
            looker = _Looker(image, training, result)
            good = [a for raw in content.annotations_of.get(image["id"], ()) if (a := reader.read(raw, image))]
            for annotation in good:
                looker.look(annotation)
            if image["id"] in unusable:
                continue
            kept = [a for a in good if not a["iscrowd"]]
            crowds += len(good) - len(kept)
            without_mask += sum("segmentation" not in a for a in kept)
            _keep_numbers(result.objects, kept, len(object_counts))
            object_counts.append(len(kept))
            if not kept:
                findings.add("image-empty", "", Where(image["id"], image["file_name"]))
            lost = training.caps.lost([a["category_id"] for a in kept]) if result.split == "val" else 0
            if lost:
                capped.append((Where(image["id"], image["file_name"]), len(kept), lost))
    keys = training.caps.keys_for(max((count for _, count, _ in capped), default=0))
    for where, count, lost in capped:
        findings.add("many-objects", f"{count} objects, {lost} of which cannot be found: set {keys}", where)
    reader.refuse_corners()
    if "bbox-corners" in findings.counts:
        findings.forget(*_OF_CORNERS)
    classes = np.array(result.objects.classes, dtype=np.int64)
    result.dataset = CocoDataset(
        name=result.source.name,
        json_file=result.source.json_file,
        image_root=result.source.image_root,
        records=RecordList([]),
        class_names=content.class_names,
        category_ids=content.category_ids,
        sizes=np.array([(i["width"], i["height"]) for i in result.images], dtype=np.int64).reshape(-1, 2),
        object_counts=np.array(object_counts, dtype=np.int64),
        class_counts=np.bincount(classes, minlength=len(content.category_ids)),
        crowds=crowds,
        without_mask=without_mask,
    )


def _keep_numbers(objects: Objects, annotations: Iterable[Annotation], image: int) -> None:
    for a in annotations:
        objects.widths.append(min(a["bbox"][2], 1e9))
        objects.heights.append(min(a["bbox"][3], 1e9))
        objects.classes.append(a["category_id"])
        objects.images.append(image)


class _Looker:
    """Looks at the annotations of one image that the loader accepts."""

    def __init__(self, image: dict[str, Any], training: Training, result: Survey) -> None:
        self.image, self.training, self.split = image, training, result.split
        self.findings = result.findings
        self.scale = training.scale(image["width"], image["height"], min(training.short_sides))
        self.seen: set[tuple[Any, ...]] = set()

    def look(self, a: Annotation) -> None:
        if a["iscrowd"]:
            return
        where = Where(self.image["id"], self.image["file_name"], a["id"])
        self._look_at_box(a["bbox"], where)
        key = (a["category_id"], *a["bbox"])
        if key in self.seen:
            self.findings.add("object-twice", "remove one of the two", where)
        self.seen.add(key)
        segmentation = a.get("segmentation")
        if segmentation is not None:
            self._compare(a["bbox"], mask_box(segmentation), where)
        elif not self.training.masks_on:
            self.findings.add("no-mask-unused", NO_MASK, where)
        elif self.split == "val":
            self.findings.add("no-mask-val", NO_MASK, where)
        else:
            self.findings.drop("no-mask", NO_MASK, where)

    def _look_at_box(self, bbox: Sequence[float], where: Where) -> None:
        x, y, w, h = bbox
        width, height = self.image["width"], self.image["height"]
        if max(bbox) <= 1 and min(width, height) > 1 and any(v != int(v) for v in bbox):
            text = f"bbox {_short(bbox)} is below one pixel: multiply by the width and height of the image"
            self.findings.add("bbox-normalised", text, where)
            return
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if max(-x, -y, x + w - width, y + h - height) > 1:
            text = f"bbox {_short(bbox)} reaches past the {width}x{height} image"
            self.findings.add("bbox-reaches-out", text, where)
        seen_width, seen_height = (x1 - x0) * self.scale[0], (y1 - y0) * self.scale[1]
        if min(seen_width, seen_height) < VISIBLE:
            text = (
                f"bbox {_short(bbox)} is {seen_width:.2g}x{seen_height:.2g} pixels at training size: remove it, or "
                f"raise INPUT.MIN_SIZE_TRAIN"
            )
            self.findings.add("object-vanishes", text, where)

    def _compare(self, bbox: Sequence[float], found: tuple[float, float, float, float], where: Where) -> None:
        x, y, w, h = bbox
        box = self._inside((x, y, x + w, y + h))
        mask = self._inside(found)
        slack = max(_FIT_PIXELS, _FIT_PART * max(w, h, mask[2] - mask[0], mask[3] - mask[1]))
        if _apart(box, mask) <= slack:
            return
        hint = "draw it again, or take the box of the mask"
        if _apart(self._inside((x, y, w, h)), mask) <= _FIT_PIXELS:
            hint = "it fits as [x0, y0, x1, y1], COCO boxes are [x, y, width, height]"
        fitting = [round(v, 1) for v in (mask[0], mask[1], mask[2] - mask[0], mask[3] - mask[1])]
        self.findings.add("bbox-mask", f"bbox {_short(bbox)}, its mask lies in {_short(fitting)}: {hint}", where)

    def _inside(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        width, height = self.image["width"], self.image["height"]
        x0, y0, x1, y1 = box
        return min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(p - q) for p, q in zip(a, b))


def _short(bbox: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in bbox) + "]"


def _look_at_the_whole(result: Survey) -> None:
    """Files named twice, equal pictures, classes without objects."""
    assert result.dataset is not None and result.content is not None
    findings = result.findings
    first: dict[Any, Any] = {}
    for image in result.content.images:
        path = os.path.normpath(image["file_name"])
        if path in first:
            text = f"the same file as image {first[path]}: put all annotations under one image"
            findings.add("file-twice", text, Where(image["id"], image["file_name"]))
        else:
            first[path] = image["id"]
    by_content: dict[bytes, dict[str, Any]] = {}
    for image in result.images:
        digest = result.digests.get(image["id"])
        if not digest:
            continue
        other = by_content.setdefault(digest, image)
        if other is not image and other["file_name"] != image["file_name"]:
            text = f"the same picture as image {other['id']} ({other['file_name']}): remove one"
            findings.add("content-twice", text, Where(image["id"], image["file_name"]))
    if "annotations" not in (result.data or {}):
        findings.add("no-truth", f"{result.source.json_file} has no 'annotations'")
    elif result.dataset.object_counts.any():
        for name, count in zip(result.dataset.class_names, result.dataset.class_counts):
            if count == 0:
                findings.add("class-empty", f"no object of {name!r}")


class Bar:
    """A progress bar on stderr; gives a function that moves it on."""

    def __init__(self, shown: bool, total: int, what: str) -> None:
        from tqdm import tqdm

        # None hides it where stderr is no terminal.
        hidden = None if shown else True
        self._bar = tqdm(total=total, desc=what, disable=hidden, leave=False, miniters=64, unit=" images")

    def __enter__(self) -> Any:
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()
