"""Geometric transforms on images (PIL bilinear on uint8), boxes, polygons and bitmaps.

Every transform is a value: drawn once per sample (``Draw*`` functions use an explicit ``numpy.random.RandomState``),
then applied to image, boxes and masks alike. Sizes are rounded and random numbers are drawn in Detectron2's order, so
that one seed gives one sample in both engines. Coordinates are continuous: pixel i covers [i, i + 1).

One inherited subtlety: coordinates that the json writes as integers stay integers, and resizing truncates them, as in
Detectron2; coordinates with a decimal point are kept in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from gn_det.errors import ConfigError, UserError

#: Values of INPUT.CROP.TYPE.
CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


class Transform(Protocol):
    """What every geometric transform offers. Arrays passed as coordinates may be changed in place."""

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 to (H', W', C) uint8."""

    def mask(self, bitmap: np.ndarray) -> np.ndarray:
        """(H, W) uint8 to (H', W') uint8, nearest neighbour."""

    def coords(self, points: np.ndarray) -> np.ndarray:
        """(P, 2) points (x, y), moved."""

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """List of (P, 2) polygons, moved; cropping may change their number."""


@dataclass(frozen=True)
class Resize:
    """Scale from (height, width) to (new_height, new_width)."""

    height: int
    width: int
    new_height: int
    new_width: int

    def image(self, pixels: np.ndarray) -> np.ndarray:
        return self._resize(pixels, Image.Resampling.BILINEAR)

    def mask(self, bitmap: np.ndarray) -> np.ndarray:
        return self._resize(bitmap, Image.Resampling.NEAREST)

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 0] = points[:, 0] * (self.new_width * 1.0 / self.width)
        points[:, 1] = points[:, 1] * (self.new_height * 1.0 / self.height)
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return [self.coords(p) for p in polygons]

    def _resize(self, pixels: np.ndarray, how: Image.Resampling) -> np.ndarray:
        single_channel = pixels.ndim == 3 and pixels.shape[2] == 1
        flat = pixels[:, :, 0] if single_channel else pixels
        out = np.asarray(Image.fromarray(flat).resize((self.new_width, self.new_height), how))
        return out[:, :, None] if single_channel else out


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right in an image of ``width`` pixels."""

    width: int

    def image(self, pixels: np.ndarray) -> np.ndarray:
        return np.flip(pixels, axis=1)

    def mask(self, bitmap: np.ndarray) -> np.ndarray:
        return np.flip(bitmap, axis=1)

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 0] = self.width - points[:, 0]
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return [self.coords(p) for p in polygons]


@dataclass(frozen=True)
class VerticalFlip:
    """Mirror top and bottom in an image of ``height`` pixels."""

    height: int

    def image(self, pixels: np.ndarray) -> np.ndarray:
        return np.flip(pixels, axis=0)

    def mask(self, bitmap: np.ndarray) -> np.ndarray:
        return np.flip(bitmap, axis=0)

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 1] = self.height - points[:, 1]
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return [self.coords(p) for p in polygons]


@dataclass(frozen=True)
class Crop:
    """Cut the window of ``width`` x ``height`` pixels whose top left corner is (x0, y0)."""

    x0: int
    y0: int
    width: int
    height: int

    def image(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[self.y0 : self.y0 + self.height, self.x0 : self.x0 + self.width]

    def mask(self, bitmap: np.ndarray) -> np.ndarray:
        return self.image(bitmap)

    def coords(self, points: np.ndarray) -> np.ndarray:
        points[:, 0] -= self.x0
        points[:, 1] -= self.y0
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Intersections with the window; invalid polygons are repaired by a zero-width buffer or dropped."""
        try:
            from shapely import geometry
        except ImportError as error:
            raise UserError(
                "INPUT.CROP.ENABLED with polygon masks needs shapely: pip install shapely, or set INPUT.CROP.ENABLED "
                "False"
            ) from error

        window = geometry.box(self.x0, self.y0, self.x0 + self.width, self.y0 + self.height).buffer(0.0)
        pieces = []
        for points in polygons:
            whole = geometry.Polygon(points).buffer(0.0)
            if not whole.is_valid:
                continue
            part = whole.intersection(window)
            for piece in getattr(part, "geoms", [part]):
                # Touching the border leaves points and lines, which have no area.
                if isinstance(piece, geometry.Polygon) and not piece.is_empty and piece.is_valid:
                    pieces.append(np.asarray(piece.exterior.coords)[:-1])
        return [self.coords(p) for p in pieces]


def resized_shape(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to ``short_side``, the longer one at most ``max_size``.

    No side becomes 0, as Detectron2 would have it for images much longer than ``max_size`` is wide.
    """
    scale = short_side * 1.0 / min(height, width)
    if height < width:
        new_h, new_w = short_side * 1.0, scale * width
    else:
        new_h, new_w = scale * height, short_side * 1.0
    if max(new_h, new_w) > max_size:
        scale = max_size * 1.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return max(int(new_h + 0.5), 1), max(int(new_w + 0.5), 1)


def draw_resize(
    shape: tuple[int, int], sizes: Sequence[int], max_size: int, style: str, rng: np.random.RandomState
) -> Resize | None:
    """Draw a short side: one of ``sizes`` ("choice") or an integer within [low, high] ("range"); 0 means no resize."""
    if style == "range":
        side = int(rng.randint(sizes[0], sizes[1] + 1))
    else:
        side = int(rng.choice(sizes))
    if side == 0:
        return None
    return Resize(*shape, *resized_shape(*shape, side, max_size))


def draw_flip(
    shape: tuple[int, int], direction: str, rng: np.random.RandomState
) -> HorizontalFlip | VerticalFlip | None:
    """Flip with probability 1/2 in ``direction`` ("horizontal" or "vertical")."""
    if rng.uniform(0, 1.0, []) >= 0.5:
        return None
    return HorizontalFlip(shape[1]) if direction == "horizontal" else VerticalFlip(shape[0])


def draw_crop(shape: tuple[int, int], kind: str, size: Sequence[float], rng: np.random.RandomState) -> Crop:
    """Draw a window of a size and place given by INPUT.CROP.TYPE and INPUT.CROP.SIZE."""
    height, width = shape
    if kind == "relative":
        crop_h, crop_w = int(height * size[0] + 0.5), int(width * size[1] + 0.5)
    elif kind == "relative_range":
        low = np.asarray(size, dtype=np.float32)
        part_h, part_w = low + rng.rand(2) * (1 - low)
        crop_h, crop_w = int(height * part_h + 0.5), int(width * part_w + 0.5)
    elif kind == "absolute":
        crop_h, crop_w = min(int(size[0]), height), min(int(size[1]), width)
    elif kind == "absolute_range":
        crop_h = rng.randint(min(height, int(size[0])), min(height, int(size[1])) + 1)
        crop_w = rng.randint(min(width, int(size[0])), min(width, int(size[1])) + 1)
    else:
        raise ConfigError(f"INPUT.CROP.TYPE {kind!r} is not known: use one of {', '.join(CROP_TYPES)}")
    y0 = int(rng.randint(height - crop_h + 1))
    x0 = int(rng.randint(width - crop_w + 1))
    return Crop(x0, y0, int(crop_w), int(crop_h))


def apply_to_box(transforms: Sequence[Transform], box: np.ndarray) -> np.ndarray:
    """Move an XYXY box (4,) by its corners; the result is the axis-aligned hull, not clipped."""
    corners = box[[0, 1, 2, 1, 0, 3, 2, 3]].reshape(4, 2)
    for transform in transforms:
        corners = transform.coords(corners)
        low, high = corners.min(axis=0), corners.max(axis=0)
        corners = np.concatenate([low, high])[[0, 1, 2, 1, 0, 3, 2, 3]].reshape(4, 2)
    return corners[[0, 3]].reshape(4)
