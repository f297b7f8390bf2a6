"""Map a record to a :class:`Sample`: read and augment the image, and transform the ground truth with it.

For the same record and random numbers, image, boxes, classes and masks equal those of Detectron2's ``DatasetMapper``.
Unlike there, one image may mix polygon and RLE objects, whatever ``INPUT.MASK_FORMAT`` is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from gn_det.data import transforms as geometry
from gn_det.data.augment import OwnTransform, apply_own, copy_paste, jitter_color, tight_box
from gn_det.data.image import ImageReader, wrong_size
from gn_det.data.records import Annotation, Record
from gn_det.data.transforms import Resize, Transform, apply_to_box, apply_to_image, resized_shape
from gn_det.errors import ConfigError, DataError
from gn_det.structures import InstanceMask, Masks, Sample, Targets, rasterize_polygons

#: Boxes with a side of at most this many pixels are dropped.
_MIN_SIDE = 1e-5


class TrainMapper:
    """Maps records to training samples, augmented with the INPUT settings and an explicit random state.

    Args:
        cfg: INPUT and MODEL.MASK_ON are read.
        augment: a torchvision.transforms.v2 transform, applied last.

    Attributes:
        cuts: whether images may be cropped, so that boxes come from the masks.
        max_pixels: largest number of pixels of a sample's image.
    """

    def __init__(self, cfg: Any, augment: OwnTransform | None = None) -> None:
        given, crop, jitter = cfg.INPUT, cfg.INPUT.CROP, cfg.INPUT.LSJ
        size, style, max_size = given.MIN_SIZE_TRAIN, given.MIN_SIZE_TRAIN_SAMPLING, given.MAX_SIZE_TRAIN
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        if style == "range" and len(sizes) != 2:
            raise ConfigError(f"INPUT.MIN_SIZE_TRAIN {size} needs (low, high) for MIN_SIZE_TRAIN_SAMPLING range")
        #: functions from an image's shape and ``rng`` to transforms, in Detectron2's order
        self._draws: list[Callable[..., list[Transform]]] = []
        if jitter.ENABLED:
            self._draws.append(partial(geometry.draw_jitter, size=jitter.SIZE, scale=jitter.SCALE))
        else:
            if crop.ENABLED:
                self._draws.append(partial(geometry.draw_crop, kind=crop.TYPE, size=crop.SIZE))
            self._draws.append(partial(geometry.draw_resize, sizes=sizes, max_size=max_size, style=style))
        if given.RANDOM_FLIP != "none":
            self._draws.append(partial(geometry.draw_flip, direction=given.RANDOM_FLIP))
        if given.ROTATION:
            self._draws.append(partial(geometry.draw_rotation, degrees=float(given.ROTATION)))
        self.cuts = bool(crop.ENABLED or jitter.ENABLED or given.ROTATION)
        self.max_pixels = jitter.SIZE**2 if jitter.ENABLED else max(sizes) * max_size
        self.reader = ImageReader.of(cfg)
        self.bgr = self.reader.image_format == "BGR"
        self.mask_format = given.MASK_FORMAT
        self.masks_on = bool(cfg.MODEL.MASK_ON)
        self.color, self.paste, self.augment = given.COLOR_JITTER, float(given.COPY_PASTE), augment

    def __call__(
        self,
        record: Record,
        rng: np.random.RandomState,
        other: Callable[[np.random.RandomState], Record] | None = None,
    ) -> Sample:
        """Map one record; the result depends only on the records, their image files and the state of ``rng``.

        Args:
            other: draws the record that INPUT.COPY_PASTE pastes objects from.

        Raises:
            DataError: the image is missing, truncated, or not of the size in the record.
            ConfigError: the user's transform fails.
        """
        sample = self._mapped(record, rng)
        if self.paste and other is not None and rng.uniform() < self.paste:
            with suppress(DataError):  # counted when this image itself is drawn
                sample = copy_paste(sample, self._mapped(other(rng), rng), rng)
        if self.augment is not None:
            sample = apply_own(sample, self.augment, rng, bgr=self.bgr)
        return sample

    def _mapped(self, record: Record, rng: np.random.RandomState) -> Sample:
        pixels = read_record_image(record, self.reader)
        # The reader's BGR is a view of RGB; the transforms are faster on RGB.
        order = slice(None, None, -1 if pixels.strides[-1] < 0 else 1)
        pixels = pixels[:, :, order]
        transforms: list[Transform] = []
        for draw in self._draws:
            drawn = draw(_shape(pixels), rng=rng)
            transforms += drawn
            pixels = apply_to_image(drawn, pixels)
        if any(self.color):
            pixels = jitter_color(pixels, self.color, rng, bgr=self.bgr and order.step == 1)
        sample = _sample(record, pixels[:, :, order])
        sample["targets"] = self.targets(record["annotations"], transforms, _shape(pixels))
        return sample

    def targets(
        self, annotations: Sequence[Annotation], transforms: Sequence[Transform], shape: tuple[int, int]
    ) -> Targets:
        """Return ground truth at network resolution ``shape`` of the non-crowd objects that keep some area.

        When masks are trained, objects without one are dropped (the loader has counted them against MAX_BAD).
        """
        objects = [a for a in annotations if not a.get("iscrowd", 0) and ("segmentation" in a or not self.masks_on)]
        boxes = torch.from_numpy(
            np.array([_moved_box(a["bbox"], transforms, shape) for a in objects], dtype=np.float32).reshape(-1, 4)
        )
        classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        masks = None
        if self.masks_on:
            masks = Masks([_moved_mask(a, transforms, shape, self.mask_format) for a in objects])
            if self.cuts:
                # After a crop or rotation, only the mask gives the tight box.
                boxes = torch.from_numpy(np.array([tight_box(m) for m in masks.masks], np.float32).reshape(-1, 4))
        keep = (boxes[:, 2] - boxes[:, 0] > _MIN_SIDE) & (boxes[:, 3] - boxes[:, 1] > _MIN_SIDE)
        if masks is not None:
            keep &= masks.nonempty()
        return Targets(shape, boxes[keep], classes[keep], None if masks is None else masks[keep])


class InferenceMapper:
    """Maps images to inference samples: resized to MIN_SIZE_TEST, deterministic, without ground truth."""

    def __init__(self, cfg: Any) -> None:
        size = cfg.INPUT.MIN_SIZE_TEST
        self.size = int(size if isinstance(size, int) else size[0])
        self.max_size = cfg.INPUT.MAX_SIZE_TEST
        self.reader = ImageReader.of(cfg)

    def __call__(self, record: Record | str | os.PathLike[str] | np.ndarray) -> Sample:
        """Map a record, an image path (then ``image_id`` is the path), or (H, W, 3) uint8 RGB pixels.

        Raises:
            DataError: the image is missing, truncated, or not of the size in the record; or the array has another type
                or shape.
        """
        if isinstance(record, np.ndarray):
            pixels, record = self.reader.from_array(record), Record(file_name="", image_id="")
        else:
            if not isinstance(record, dict):
                record = Record(file_name=os.fspath(record), image_id=os.fspath(record))
            pixels = read_record_image(record, self.reader)
        record.setdefault("height", pixels.shape[0])
        record.setdefault("width", pixels.shape[1])
        if self.size:
            height, width = _shape(pixels)
            pixels = Resize(height, width, *resized_shape(height, width, self.size, self.max_size)).image(pixels)
        return _sample(record, pixels)


def read_record_image(record: Record, reader: ImageReader) -> np.ndarray:
    """Read the pixels of a record, which must have the size in the record.

    Raises:
        ImageError: the file is missing, damaged or of another size.
    """
    pixels = reader.read(record["file_name"])
    expected = (record.get("height", pixels.shape[0]), record.get("width", pixels.shape[1]))
    if _shape(pixels) != expected:
        raise wrong_size(record["file_name"], _shape(pixels)[::-1], expected[::-1])
    return pixels


def _shape(pixels: np.ndarray) -> tuple[int, int]:
    return int(pixels.shape[0]), int(pixels.shape[1])


def _sample(record: Record, pixels: np.ndarray) -> Sample:
    return Sample(
        image=torch.from_numpy(np.stack([pixels[:, :, c] for c in range(pixels.shape[2])])),  # faster than a transpose
        height=record["height"],
        width=record["width"],
        image_id=record["image_id"],
        file_name=record["file_name"],
    )


def _moved_box(bbox: Sequence[float], transforms: Sequence[Transform], shape: tuple[int, int]) -> np.ndarray:
    # Add XYWH in float32, or int64 for integers, like Detectron2's box mode conversion.
    box = torch.tensor(list(bbox))
    box[2:] += box[:2]
    corners = np.array(box.tolist())
    return apply_to_box(transforms, corners).clip(0, [shape[1], shape[0], shape[1], shape[0]])


def _moved_mask(
    annotation: Annotation, transforms: Sequence[Transform], shape: tuple[int, int], mask_format: str
) -> InstanceMask:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        from pycocotools import mask as coco_mask

        bitmap = coco_mask.decode(segmentation)
        for transform in transforms:
            bitmap = transform.mask(bitmap)
        return np.ascontiguousarray(bitmap).astype(bool)
    polygons = [np.asarray(p).reshape(-1, 2) for p in segmentation]
    for transform in transforms:
        polygons = transform.polygons(polygons)
    flat = [p.reshape(-1).astype(np.float64) for p in polygons]
    return flat if mask_format == "polygon" else rasterize_polygons(flat, *shape)
