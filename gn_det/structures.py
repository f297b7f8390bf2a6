"""Ground truth and detections as they travel between data, model and evaluation.

Shape letters: N objects or detections of one image; H, W image rows and columns; S side of a mask crop in pixels.
Boxes are ``float32`` absolute pixel coordinates ``(x0, y0, x1, y1)`` in continuous coordinates (pixel i covers
[i, i + 1)), as in Detectron2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: One object's mask: polygons as flat float64 arrays ``x0, y0, x1, y1, ...`` in pixels, or a (H, W) bool bitmap.
InstanceMask = list[np.ndarray] | np.ndarray


def to_numpy(values: Any) -> np.ndarray:
    """A tensor, array or sequence as an array in host memory."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (M, N) IoU of XYXY boxes ``a`` (M, 4) and ``b`` (N, 4)."""
    inter = (np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])).clip(0).prod(axis=2)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (a, b))
    iou: np.ndarray = inter / np.maximum(area_a[:, None] + area_b - inter, 1e-9)
    return iou


def rasterize_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Union of polygons as a (height, width) bool bitmap, rasterized by the COCO mask API."""
    from pycocotools import mask as coco_mask

    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    rles = coco_mask.frPyObjects(list(polygons), height, width)
    bitmap: np.ndarray = coco_mask.decode(coco_mask.merge(rles))
    return bitmap.astype(bool)


def rasterize_polygons_within_box(polygons: Sequence[np.ndarray], box: np.ndarray, size: int) -> np.ndarray:
    """Mask target of one object: its polygons, moved and scaled from ``box`` to a (size, size) bool grid.

    Follows Detectron2's polygon mask targets: box sides below 0.1 px count as 0.1 px.
    """
    # Round scales to float32 like Detectron2 (NumPy 2); in float64, a pixel flips in 0.2 % of objects.
    x0, y0, x1, y1 = np.asarray(box, dtype=np.float32)
    ratio_w, ratio_h = (float(np.float32(size) / side) if side > 0.1 else size / 0.1 for side in (x1 - x0, y1 - y0))
    moved = []
    for polygon in polygons:
        p = np.array(polygon, dtype=np.float64)
        p[0::2] = (p[0::2] - float(x0)) * ratio_w
        p[1::2] = (p[1::2] - float(y0)) * ratio_h
        moved.append(p)
    return rasterize_polygons(moved, size, size)


class MaskCrop(NamedTuple):
    """The part of an (H, W) mask that holds all of its pixels.

    Attributes:
        top, left: row and column of the crop's first pixel in the image.
        bitmap: (h, w) bool; (0, 0) for an empty mask.
    """

    top: int
    left: int
    bitmap: np.ndarray


def crop_mask(mask: np.ndarray, top: int = 0, left: int = 0) -> MaskCrop:
    """Cut the (H, W) bool ``mask``, whose first pixel is at ``top``, ``left`` of its image, to its own pixels."""
    columns = np.flatnonzero(mask.any(axis=0))
    if len(columns) == 0:
        return MaskCrop(top, left, mask[:0, :0])
    strip = mask[:, columns[0] : columns[-1] + 1]
    rows = np.flatnonzero(strip.any(axis=1))
    return MaskCrop(top + int(rows[0]), left + int(columns[0]), strip[rows[0] : rows[-1] + 1])


def in_window(crop: MaskCrop, window: Sequence[int]) -> np.ndarray:
    """Return the (y1 - y0, x1 - x0) bool mask of ``crop`` in the ``window`` (x0, y0, x1, y1) of its image."""
    x0, y0, x1, y1 = window
    out = np.zeros((y1 - y0, x1 - x0), dtype=bool)
    top, left, bitmap = crop
    low_y, low_x = max(top, y0), max(left, x0)
    part = bitmap[low_y - top : max(y1 - top, 0), low_x - left : max(x1 - left, 0)]
    out[low_y - y0 :, low_x - x0 :][: part.shape[0], : part.shape[1]] = part
    return out


def encode_crop(crop: MaskCrop, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of a mask of a (height, width) image, given by the part that holds its pixels.

    The same text as pycocotools' encoder writes: ``{"size": [height, width], "counts": text}``.
    """
    from pycocotools import mask as coco_mask

    top, left, bitmap = crop
    columns = np.zeros((bitmap.shape[1], bitmap.shape[0] + 2), dtype=np.int8)
    columns[:, 1:-1] = bitmap.T
    column, row = np.nonzero(np.diff(columns))  # where runs begin and end, in turn
    edges = (column + left) * height + row + top
    # A run that reaches the bottom continues at the top of the next column.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("utf-8")}


class Masks:
    """The ground-truth masks of one image's N objects; polygons and bitmaps may be mixed."""

    def __init__(self, masks: Sequence[InstanceMask]) -> None:
        self.masks: list[InstanceMask] = list(masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: Tensor | np.ndarray | slice | Sequence[int]) -> Masks:
        """Select objects by a bool mask (N,), integer indices or a slice; always returns :class:`Masks`."""
        if isinstance(index, slice):
            return Masks(self.masks[index])
        idx = to_numpy(index)
        if idx.dtype == bool:
            idx = np.flatnonzero(idx)
        return Masks([self.masks[int(i)] for i in idx])

    def nonempty(self) -> Tensor:
        """Return (N,) bool: whether a mask has polygons or pixels."""
        import torch

        found = [len(mask) > 0 if isinstance(mask, list) else bool(mask.any()) for mask in self.masks]
        return torch.tensor(found, dtype=torch.bool)

    def bitmaps(self, height: int, width: int) -> Iterator[np.ndarray]:
        """Yield every mask as a (height, width) bool bitmap."""
        return (rasterize_polygons(mask, height, width) if isinstance(mask, list) else mask for mask in self.masks)

    def crop_and_resize(self, boxes: Tensor, size: int) -> Tensor:
        """Mask targets: each mask cut by its own box and resized.

        Args:
            boxes: (N, 4) float32, one box per mask, any device.
            size: side S of the target grid.

        Returns:
            (N, S, S) bool on the device of ``boxes``. Polygons are rasterized inside the box; bitmaps are cropped
            with aligned RoIAlign (one sample grid per bin, adaptive) and thresholded at 0.5, as Detectron2 does.
        """
        import torch
        from torchvision.ops import roi_align

        if len(boxes) != len(self.masks):
            raise ValueError(f"{len(boxes)} boxes for {len(self.masks)} masks")
        out = torch.zeros((len(self.masks), size, size), dtype=torch.bool)
        cpu_boxes = boxes.detach().to("cpu", torch.float32)
        for i, mask in enumerate(self.masks):
            if isinstance(mask, list):
                out[i] = torch.from_numpy(rasterize_polygons_within_box(mask, cpu_boxes[i].numpy(), size))
            else:
                grid = torch.as_tensor(mask, dtype=torch.float32)[None, None]
                crop = roi_align(grid, [cpu_boxes[i : i + 1]], (size, size), 1.0, 0, aligned=True)
                out[i] = crop[0, 0] >= 0.5
        return out.to(boxes.device)


@dataclass
class Targets:
    """Ground truth of one image at network resolution.

    Attributes:
        image_size: (H, W) of the resized image, before padding.
        boxes: (N, 4) float32 XYXY.
        classes: (N,) int64, contiguous class indices in [0, num_classes).
        masks: N masks, or None where masks are not trained.
    """

    image_size: tuple[int, int]
    boxes: Tensor
    classes: Tensor
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device | str) -> Targets:
        """Copy with tensors on ``device``; masks stay in host memory."""
        return Targets(self.image_size, self.boxes.to(device), self.classes.to(device), self.masks)


@dataclass
class Detections:
    """Detections of one image, sorted by descending score per class-wise NMS order, at ``image_size``.

    Attributes:
        image_size: (H, W) that boxes and masks refer to (the original image after post-processing).
        boxes: (N, 4) float32 XYXY.
        scores: (N,) float32 in [0, 1].
        classes: (N,) int64 contiguous class indices.
        masks: (N, H, W) bool, or None without a mask head.
    """

    image_size: tuple[int, int]
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass
class ArrayDetections:
    """:class:`Detections` in NumPy arrays, for code that runs without torch."""

    image_size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)


class AnyDetections(Protocol):
    """What is drawn and written: :class:`Detections`, or the same in NumPy arrays."""

    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def boxes(self) -> Tensor | np.ndarray: ...
    @property
    def scores(self) -> Tensor | np.ndarray: ...
    @property
    def classes(self) -> Tensor | np.ndarray: ...
    @property
    def masks(self) -> Tensor | np.ndarray | None: ...
    def __len__(self) -> int: ...


class Sample(TypedDict, total=False):
    """One element of a batch, the counterpart of Detectron2's dataset dict after the mapper.

    Keys: ``image`` (C, H, W) uint8 in ``INPUT.FORMAT`` order at network resolution; ``height``, ``width`` original
    size in pixels; ``image_id`` COCO id; ``file_name``; ``targets`` only for training.
    """

    image: Tensor
    height: int
    width: int
    image_id: Any
    file_name: str
    targets: Targets
