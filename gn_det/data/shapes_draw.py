"""Draw one scene of the ``shapes`` set with numpy and PIL."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("circle", "square", "triangle", "star", "ring")

#: Objects are drawn larger by this factor and scaled down, for smooth edges.
_FINE = 4
#: No object may be covered so far that less than this share stays visible.
_LEAST_VISIBLE = 0.8
#: Corners and size of each class.
_SHAPES = {"circle": (48, 1.0), "square": (4, 1.15), "triangle": (3, 1.25), "star": (10, 1.2), "ring": (48, 1.0)}
_IMAGE_SIZES = ((160, 160), (160, 200), (200, 160), (160, 184), (176, 160))


@dataclass
class Drawn:
    """One object: class index, visible pixels (H, W) bool, outline (P, 2) if it is whole and has no hole."""

    category: int
    visible: np.ndarray
    outline: np.ndarray | None


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[Drawn]]:
    """Draw an image (H, W, 3) uint8 RGB and its objects, back to front."""
    height, width = _IMAGE_SIZES[rng.integers(len(_IMAGE_SIZES))]
    canvas, tone = _background(rng, height, width)
    objects: list[Drawn] = []
    areas: list[int] = []
    wanted = int(rng.integers(2, 6))
    for _ in range(4 * wanted):
        if len(objects) == wanted:
            break
        category = int(rng.integers(len(CLASSES)))
        outline, hole = _random_outline(rng, category, height, width, (13, 0.3 * min(height, width)))
        cover = _coverage(outline, hole, height, width)
        mask = cover >= 0.5
        if not _leaves_others_visible(mask, objects, areas):
            continue
        for other in objects:
            if (other.visible & mask).any():
                other.visible &= ~mask
                other.outline = None
        _paint(rng, canvas, cover, outline, tone)
        inside = (outline >= 0).all() and (outline[:, 0] <= width).all() and (outline[:, 1] <= height).all()
        objects.append(Drawn(category, mask, outline if hole is None and inside else None))
        areas.append(int(mask.sum()))
    return _finish(rng, canvas), objects


def draw_single(rng: np.random.Generator, category: int, side: int) -> np.ndarray:
    """Draw a square image (side, side, 3) uint8 RGB mostly filled by one object of the class."""
    canvas, tone = _background(rng, side, side)
    outline, hole = _random_outline(rng, category, side, side, (0.25 * side, 0.42 * side))
    _paint(rng, canvas, _coverage(outline, hole, side, side), outline, tone)
    return _finish(rng, canvas)


def _finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Add sensor noise and convert to bytes."""
    noise = 3 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def _leaves_others_visible(mask: np.ndarray, objects: list[Drawn], areas: list[int]) -> bool:
    if mask.sum() < 120:
        return False
    return all((o.visible & ~mask).sum() >= _LEAST_VISIBLE * area for o, area in zip(objects, areas))


def _random_outline(
    rng: np.random.Generator, category: int, height: int, width: int, sizes: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return corners (P, 2) in pixels, and those of the hole for a ring; the radius is between ``sizes``."""
    # Sizes are uniform on a log scale: as many small objects as large ones.
    radius = float(np.exp(rng.uniform(np.log(sizes[0]), np.log(sizes[1]))))
    border = 0.7 * radius
    center = np.array([rng.uniform(border, width - border), rng.uniform(border, height - border)])
    name = CLASSES[category]
    # Tilted, not upside down: the quickstart has too few iterations to learn invariances.
    turn = rng.uniform(-0.35, 0.35) + (np.pi / 4 if name == "square" else -np.pi / 2)
    corners, size = _SHAPES[name]
    angles = (0.0 if corners == 48 else turn) + 2 * np.pi * np.arange(corners) / corners
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1) * size
    if name == "star":
        unit[1::2] *= 0.45
    hole = center + radius * rng.uniform(0.45, 0.6) * unit if name == "ring" else None
    return center + radius * unit, hole


def _coverage(outline: np.ndarray, hole: np.ndarray | None, height: int, width: int) -> np.ndarray:
    """Return (height, width) float32: the share of each pixel that the shape covers."""
    x0, y0 = np.maximum(np.floor(outline.min(axis=0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(outline.max(axis=0)).astype(int) + 1, [width, height])
    patch = Image.new("L", ((x1 - x0) * _FINE, (y1 - y0) * _FINE))
    pen = ImageDraw.Draw(patch)
    pen.polygon([tuple(p) for p in ((outline - [x0, y0]) * _FINE - 0.5).tolist()], fill=255)
    if hole is not None:
        pen.polygon([tuple(p) for p in ((hole - [x0, y0]) * _FINE - 0.5).tolist()], fill=0)
    fine = np.asarray(patch, dtype=np.float32).reshape(y1 - y0, _FINE, x1 - x0, _FINE)
    cover = np.zeros((height, width), dtype=np.float32)
    cover[y0:y1, x0:x1] = fine.mean(axis=(1, 3)) / 255
    return cover


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Return (height, width) float32 in about [-1, 1]: random values on a coarse grid, interpolated."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float]:
    """Return a muted texture (H, W, 3) float32, and its lightness in [0, 1]."""
    lightness = float(rng.choice([rng.uniform(0.18, 0.36), rng.uniform(0.62, 0.84)]))
    hue = rng.uniform()
    base = np.array(colorsys.hls_to_rgb(hue, lightness, rng.uniform(0.08, 0.3)), dtype=np.float32) * 255
    second = np.array(colorsys.hls_to_rgb((hue + rng.uniform(0.05, 0.2)) % 1, lightness, 0.25), np.float32) * 255
    blend = 0.5 + 0.5 * _smooth_noise(rng, height, width, 4)
    canvas = base + (second - base) * blend[..., None]
    octaves = ((12, 9.0), (40, 7.0), (110, 6.0))
    grain = np.sum([_smooth_noise(rng, height, width, cells) * weight for cells, weight in octaves], axis=0)
    rows, columns = np.ogrid[0:height, 0:width]
    kind = rng.integers(4)
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(7, 18)
    along, across = _turned(rows, columns, angle)
    if kind == 0:  # planks or stripes
        grain = grain + 9 * np.sign(np.sin(2 * np.pi * along / period))
    elif kind == 1:  # woven cloth
        grain = grain + 7 * np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period)
    elif kind == 2:  # wood-like waves
        grain = grain + 9 * np.sin(2 * np.pi * along / period + 3 * _smooth_noise(rng, height, width, 5))
    return (canvas + grain[..., None]).astype(np.float32), lightness


def _turned(rows: np.ndarray, columns: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates along and across a direction."""
    return columns * np.cos(angle) + rows * np.sin(angle), -columns * np.sin(angle) + rows * np.cos(angle)


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, cover: np.ndarray, outline: np.ndarray, background: float
) -> None:
    """Paint one object on ``canvas`` in place: soft shadow, shaded and patterned fill, darker rim."""
    height, width = cover.shape
    low = np.maximum(np.floor(outline.min(axis=0)).astype(int) - 6, 0)
    high = np.minimum(np.ceil(outline.max(axis=0)).astype(int) + 8, [width, height])
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    alpha, under = cover[window], canvas[window]
    shadow = _blur(alpha, 2, shift=2)
    under *= 1 - 0.45 * shadow[..., None]
    # Light on dark, or dark on light, is visible at any hue.
    lightness = rng.uniform(0.5, 0.7) if background < 0.5 else rng.uniform(0.3, 0.5)
    hue = rng.uniform()
    color = np.array(colorsys.hls_to_rgb(hue, lightness, rng.uniform(0.65, 0.95)), dtype=np.float32) * 255
    rows, columns = np.mgrid[low[1] : high[1], low[0] : high[0]].astype(np.float32)
    center, extent = outline.mean(axis=0), max(float(np.ptp(outline)), 1.0)
    light = 1 - 0.45 * ((columns - center[0]) + (rows - center[1])) / extent
    fill = color * np.clip(light, 0.7, 1.3)[..., None]
    kind = rng.integers(5)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 9)
    along, across = _turned(rows, columns, angle)
    if kind == 0:
        fill *= (1 - 0.16 * (np.sin(2 * np.pi * along / period) > 0.2))[..., None]
    elif kind == 1:
        dots = np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period) > 0.35
        fill *= (1 + 0.22 * dots)[..., None]
    rim = np.clip(alpha - _blur((alpha >= 0.5).astype(np.float32), 1), 0, 1) * 1.6
    fill = np.clip(fill * (1 - 0.6 * np.clip(rim, 0, 1))[..., None], 0, 255)
    under += (fill - under) * alpha[..., None]


def _blur(values: np.ndarray, radius: int, shift: int = 0) -> np.ndarray:
    """Return a blurred copy of values in [0, 1], moved right and down by ``shift`` pixels."""
    image = Image.fromarray((values * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(radius))
    out = np.zeros(values.shape, dtype=np.float32)
    height, width = values.shape
    out[shift:, shift:] = np.asarray(image, dtype=np.float32)[: height - shift, : width - shift] / 255
    return out
