"""A record becomes a :class:`Sample`: read, crop, resize, flip, and ground truth moved along.

Equal to Detectron2's ``DatasetMapper`` on the same record and the same random numbers: image tensor, boxes, classes and
masks. Beyond it, one image may mix polygon and RLE objects whatever ``INPUT.MASK_FORMAT`` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gn_det.data.image import ImageReader, wrong_size
from gn_det.data.records import Annotation, Record
from gn_det.data.transforms import (
    Resize,
    Transform,
    apply_to_box,
    draw_crop,
    draw_flip,
    draw_resize,
    resized_shape,
)
from gn_det.errors import ConfigError
from gn_det.structures import InstanceMask, Masks, Sample, Targets, rasterize_polygons

#: Boxes with a side at or below this many pixels are no ground truth.
_MIN_SIDE = 1e-5


class TrainMapper:
    """Training samples with random crop, resize and flip drawn from an explicit random state."""

    def __init__(self, cfg: Any) -> None:
        size, crop = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP
        self.sizes: tuple[int, ...] = (size, size) if isinstance(size, int) else tuple(size)
        self.style = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        if self.style == "range" and len(self.sizes) != 2:
            raise ConfigError(f"INPUT.MIN_SIZE_TRAIN {size} needs (low, high) for MIN_SIZE_TRAIN_SAMPLING range")
        self.max_size = cfg.INPUT.MAX_SIZE_TRAIN
        self.flip = cfg.INPUT.RANDOM_FLIP
        self.reader = ImageReader.of(cfg)
        self.mask_format = cfg.INPUT.MASK_FORMAT
        self.masks_on = bool(cfg.MODEL.MASK_ON)
        self.crop: tuple[str, Sequence[float]] | None = (crop.TYPE, crop.SIZE) if crop.ENABLED else None

    def __call__(self, record: Record, rng: np.random.RandomState) -> Sample:
        """Map one record; the result is a pure function of the record, its image file and the state of ``rng``.

        Raises:
            DataError: the image is missing, truncated, or not of the size that the record says.
        """
        pixels = read_record_image(record, self.reader)
        transforms: list[Transform] = []
        draws: tuple[Callable[[tuple[int, int]], Transform | None], ...] = (
            lambda shape: draw_crop(shape, *self.crop, rng) if self.crop else None,
            lambda shape: draw_resize(shape, self.sizes, self.max_size, self.style, rng),
            lambda shape: draw_flip(shape, self.flip, rng) if self.flip != "none" else None,
        )
        for draw in draws:
            transform = draw(_shape(pixels))
            if transform is not None:
                transforms.append(transform)
                pixels = transform.image(pixels)
        sample = _sample(record, pixels)
        sample["targets"] = self.targets(record["annotations"], transforms, _shape(pixels))
        return sample

    def targets(
        self, annotations: Sequence[Annotation], transforms: Sequence[Transform], shape: tuple[int, int]
    ) -> Targets:
        """Ground truth of the objects that are no crowd and keep some area, at network resolution ``shape``.

        Where masks are trained, objects without one are left out (the loader has counted them against MAX_BAD).
        """
        objects = [a for a in annotations if not a.get("iscrowd", 0) and ("segmentation" in a or not self.masks_on)]
        boxes = torch.from_numpy(
            np.array([_moved_box(a["bbox"], transforms, shape) for a in objects], dtype=np.float32).reshape(-1, 4)
        )
        classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        masks = None
        if self.masks_on:
            masks = Masks([_moved_mask(a, transforms, shape, self.mask_format) for a in objects])
            if self.crop:
                # A crop leaves part of an object: its tight box is known from its mask only.
                boxes = torch.from_numpy(np.array([_mask_box(m) for m in masks.masks], np.float32).reshape(-1, 4))
        keep = (boxes[:, 2] - boxes[:, 0] > _MIN_SIDE) & (boxes[:, 3] - boxes[:, 1] > _MIN_SIDE)
        if masks is not None:
            keep &= torch.tensor([_has_pixels(m) for m in masks.masks], dtype=torch.bool)
        return Targets(shape, boxes[keep], classes[keep], None if masks is None else masks[keep])


class InferenceMapper:
    """Inference samples: resized to MIN_SIZE_TEST, nothing random, no ground truth."""

    def __init__(self, cfg: Any) -> None:
        size = cfg.INPUT.MIN_SIZE_TEST
        self.size = int(size if isinstance(size, int) else size[0])
        self.max_size = cfg.INPUT.MAX_SIZE_TEST
        self.reader = ImageReader.of(cfg)

    def __call__(self, record: Record | str | os.PathLike[str] | np.ndarray) -> Sample:
        """Map a record, an image given by its path (then ``image_id`` is the path), or (H, W, 3) uint8 RGB pixels.

        Raises:
            DataError: the image is missing, truncated, or not of the size that the record says; or an array of
                another type or shape.
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
    """Pixels of a record as ``reader`` gives them, which must have the size that the record says.

    Raises:
        ImageError: missing, damaged or of another size.
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
        image=torch.as_tensor(np.array(pixels.transpose(2, 0, 1), order="C")),
        height=record["height"],
        width=record["width"],
        image_id=record["image_id"],
        file_name=record["file_name"],
    )


def _moved_box(bbox: Sequence[float], transforms: Sequence[Transform], shape: tuple[int, int]) -> np.ndarray:
    # XYWH is added up in float32, whole numbers in int64, as Detectron2's box mode conversion does.
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


def _has_pixels(mask: InstanceMask) -> bool:
    return len(mask) > 0 if isinstance(mask, list) else bool(mask.any())


def _mask_box(mask: InstanceMask) -> np.ndarray:
    """Tight XYXY float32 box of a mask; without area where the mask is empty."""
    if isinstance(mask, list):
        if not mask:
            return np.zeros(4, dtype=np.float32)
        points = np.concatenate(mask).reshape(-1, 2).astype(np.float32)
        return np.concatenate([points.min(axis=0), np.maximum(points.max(axis=0), 0)])
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return np.zeros(4, dtype=np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
