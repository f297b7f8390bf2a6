"""Geometric transforms on images (PIL bilinear on uint8), boxes, polygons and bitmaps.

Every transform is a value. It is drawn once per sample (``draw_*`` functions take the (height, width) of the image and
an explicit ``numpy.random.RandomState``), then applied to image, boxes and masks. Rounding and the order of random
numbers are Detectron2's, so one seed gives the same sample in both engines. Coordinates are continuous: pixel i covers
[i, i + 1).

As in Detectron2, coordinates written as integers in the json stay integers, and resizing truncates them. Coordinates
with a decimal point are kept in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from gn_det.data.resize import can_resize, resize

#: Gray value of the padding, as in Detectron2's FixedSizeCrop.
PAD_VALUE = 128


class Transform:
    """Interface of a geometric transform. Arrays passed as coordinates may be changed in place."""

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 to (H', W', C) uint8; what comes from outside is gray."""
        return self._moved(pixels, Image.Resampling.BILINEAR, PAD_VALUE)

    def mask(self, bitmap: np.ndarray) -> np.ndarray:
        """(H, W) uint8 to (H', W') uint8, nearest neighbor; what comes from outside is empty."""
        return self._moved(bitmap, Image.Resampling.NEAREST, 0)

    def _moved(self, array: np.ndarray, how: Image.Resampling, fill: int) -> np.ndarray:
        raise NotImplementedError

    def coords(self, points: np.ndarray) -> np.ndarray:
        """Move (P, 2) points (x, y)."""
        raise NotImplementedError

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Move a list of (P, 2) polygons; cropping may change their number."""
        return [self.coords(p) for p in polygons]


@dataclass(frozen=True)
class Resize(Transform):
    """Scale from (height, width) to (new_height, new_width)."""

    height: int
    width: int
    new_height: int
    new_width: int

    def _moved(self, array: np.ndarray, how: Image.Resampling, fill: int) -> np.ndarray:
        if how is Image.Resampling.BILINEAR and can_resize(array, self.new_height, self.new_width):
            return resize(array, self.new_height, self.new_width)
        out = np.asarray(_pillow(array).resize((self.new_width, self.new_height), how))
        return out.reshape(*out.shape[:2], *array.shape[2:])

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 0] = points[:, 0] * (self.new_width * 1.0 / self.width)
        points[:, 1] = points[:, 1] * (self.new_height * 1.0 / self.height)
        return points

    def window(self, pixels: np.ndarray, crop: Crop) -> np.ndarray:
        """Return the ``crop`` of :meth:`image`, bit-identical but with less work."""
        if not can_resize(pixels, self.new_height, self.new_width):
            return crop.image(self.image(pixels))
        rows, columns = slice(crop.y0, crop.y0 + crop.height), slice(crop.x0, crop.x0 + crop.width)
        return resize(pixels, self.new_height, self.new_width, rows, columns)


@dataclass(frozen=True)
class Flip(Transform):
    """Mirror left-right (``axis`` 1) or top-bottom (0) in an image of ``size`` pixels along the axis."""

    axis: int
    size: int

    def _moved(self, array: np.ndarray, how: Image.Resampling, fill: int) -> np.ndarray:
        return np.flip(array, axis=self.axis)

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 1 - self.axis] = self.size - points[:, 1 - self.axis]
        return points


@dataclass(frozen=True)
class Crop(Transform):
    """Crop the window of ``width`` x ``height`` pixels with top left corner (x0, y0)."""

    x0: int
    y0: int
    width: int
    height: int

    def _moved(self, array: np.ndarray, how: Image.Resampling, fill: int) -> np.ndarray:
        return array[self.y0 : self.y0 + self.height, self.x0 : self.x0 + self.width]

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 0] -= self.x0
        points[:, 1] -= self.y0
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Intersect with the window; invalid polygons are repaired by a zero-width buffer or dropped."""
        from shapely import geometry

        window = geometry.box(self.x0, self.y0, self.x0 + self.width, self.y0 + self.height).buffer(0.0)
        pieces = []
        for points in polygons:
            whole = geometry.Polygon(points).buffer(0.0)
            if not whole.is_valid:
                continue
            part = whole.intersection(window)
            for piece in getattr(part, "geoms", [part]):
                # A polygon that touches the border leaves points and lines without area.
                if isinstance(piece, geometry.Polygon) and not piece.is_empty and piece.is_valid:
                    pieces.append(np.asarray(piece.exterior.coords)[:-1])
        return [self.coords(p) for p in pieces]


@dataclass(frozen=True)
class Pad(Transform):
    """Add rows below and columns to the right, up to ``height`` x ``width``."""

    height: int
    width: int

    def _moved(self, array: np.ndarray, how: Image.Resampling, fill: int) -> np.ndarray:
        out = np.full((self.height, self.width, *array.shape[2:]), fill, dtype=array.dtype)
        out[: array.shape[0], : array.shape[1]] = array
        return out

    def coords(self, points: np.ndarray) -> np.ndarray:
        return points


@dataclass(frozen=True)
class Rotate(Transform):
    """Rotate counterclockwise by ``degrees`` about the center of a ``height`` x ``width`` image, keeping its size."""

    height: int
    width: int
    degrees: float

    def _moved(self, array: np.ndarray, how: Image.Resampling, fill: int) -> np.ndarray:
        picture = _pillow(array)
        color: Any = (fill,) * len(picture.getbands()) if picture.mode != "L" else fill
        return np.asarray(picture.rotate(self.degrees, how, fillcolor=color)).reshape(array.shape)

    def coords(self, points: np.ndarray) -> np.ndarray:
        sin, cos = np.sin(np.deg2rad(self.degrees)), np.cos(np.deg2rad(self.degrees))
        center = np.array([self.width / 2, self.height / 2])
        rotated: np.ndarray = (points - center) @ np.array([[cos, -sin], [sin, cos]]) + center
        return rotated

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Rotate polygons and clip them to the image."""
        return Crop(0, 0, self.width, self.height).polygons([self.coords(p) for p in polygons])


def _pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def apply_to_image(transforms: Sequence[Transform], pixels: np.ndarray) -> np.ndarray:
    """Apply all transforms to (H, W, C) uint8 pixels."""
    rest = list(transforms)
    while rest:
        transform = rest.pop(0)
        if isinstance(transform, Resize) and rest and isinstance(rest[0], Crop):
            crop = rest.pop(0)
            pixels = transform.window(pixels, crop)  # type: ignore[arg-type]
        else:
            pixels = transform.image(pixels)
    return pixels


def resized_shape(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Return (height, width) after scaling the shorter side to ``short_side`` and the longer to at most ``max_size``.

    Unlike in Detectron2, no side of a very elongated image becomes 0.
    """
    scale = short_side * 1.0 / min(height, width)
    new_h, new_w = (short_side * 1.0, scale * width) if height < width else (scale * height, short_side * 1.0)
    if max(new_h, new_w) > max_size:
        scale = max_size * 1.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return max(int(new_h + 0.5), 1), max(int(new_w + 0.5), 1)


def draw_resize(
    shape: tuple[int, int], sizes: Sequence[int], max_size: int, style: str, rng: np.random.RandomState
) -> list[Transform]:
    """Draw a short side: one of ``sizes`` ("choice") or an integer within [low, high] ("range"); 0 means no resize."""
    side = int(rng.randint(sizes[0], sizes[1] + 1) if style == "range" else rng.choice(sizes))
    return [Resize(*shape, *resized_shape(*shape, side, max_size))] if side else []


def draw_flip(shape: tuple[int, int], direction: str, rng: np.random.RandomState) -> list[Transform]:
    """Flip with probability 1/2 in ``direction`` ("horizontal" or "vertical")."""
    axis = 1 if direction == "horizontal" else 0
    return [Flip(axis, shape[axis])] if rng.uniform(0, 1.0, []) < 0.5 else []


def draw_crop(shape: tuple[int, int], kind: str, size: Sequence[float], rng: np.random.RandomState) -> list[Transform]:
    """Draw a window with the size of INPUT.CROP.TYPE and INPUT.CROP.SIZE at a random place."""
    height, width = shape
    if kind == "relative":
        crop_h, crop_w = int(height * size[0] + 0.5), int(width * size[1] + 0.5)
    elif kind == "relative_range":
        low = np.asarray(size, dtype=np.float32)
        part_h, part_w = low + rng.rand(2) * (1 - low)
        crop_h, crop_w = int(height * part_h + 0.5), int(width * part_w + 0.5)
    elif kind == "absolute":
        crop_h, crop_w = min(int(size[0]), height), min(int(size[1]), width)
    else:  # absolute_range
        crop_h = rng.randint(min(height, int(size[0])), min(height, int(size[1])) + 1)
        crop_w = rng.randint(min(width, int(size[0])), min(width, int(size[1])) + 1)
    y0 = int(rng.randint(height - crop_h + 1))
    x0 = int(rng.randint(width - crop_w + 1))
    return [Crop(x0, y0, int(crop_w), int(crop_h))]


def draw_jitter(
    shape: tuple[int, int], size: int, scale: Sequence[float], rng: np.random.RandomState
) -> list[Transform]:
    """Large-scale jitter: fit the image into a square of ``size`` times a drawn factor, then crop and pad to ``size``.

    Args:
        scale: smallest and largest factor.
    """
    side = size * rng.uniform(scale[0], scale[1])
    factor = min(side / shape[0], side / shape[1])
    height, width = (max(round(length * factor), 1) for length in shape)
    part = rng.uniform(0.0, 1.0)  # places the window along both axes
    y0, x0 = (round(max(length - size, 0) * part) for length in (height, width))
    return [Resize(*shape, height, width), Crop(x0, y0, size, size), Pad(size, size)]


def draw_rotation(shape: tuple[int, int], degrees: float, rng: np.random.RandomState) -> list[Transform]:
    """Rotate by an angle drawn from [-degrees, degrees]."""
    return [Rotate(*shape, float(rng.uniform(-degrees, degrees)))]


def apply_to_box(transforms: Sequence[Transform], box: np.ndarray) -> np.ndarray:
    """Transform the corners of an XYXY box (4,); return their axis-aligned hull, not clipped."""
    corners = box[[0, 1, 2, 1, 0, 3, 2, 3]].reshape(4, 2)
    for transform in transforms:
        corners = transform.coords(corners)
        low, high = corners.min(axis=0), corners.max(axis=0)
        corners = np.concatenate([low, high])[[0, 1, 2, 1, 0, 3, 2, 3]].reshape(4, 2)
    return corners[[0, 3]].reshape(4)
