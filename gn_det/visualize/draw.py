"""Drawings of detections: masks, boxes and labels on the image, and several images in a grid. Made with Pillow."""

from __future__ import annotations

import bisect
import functools
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from gn_det.structures import AnyDetections, MaskCrop, crop_mask, in_window, rasterize_polygons, to_numpy
from gn_det.visualize.colors import Color, class_color

if TYPE_CHECKING:
    from gn_det.data.records import Record
    from gn_det.structures import Sample

Box = tuple[float, float, float, float]
#: Which labels are drawn: all, those that fit (in a crowded image no label is larger than its object or covers
#: another one), or none.
Labels = Literal["all", "fit", "none"]
#: What colors encode.
Colors = Literal["class", "instance"]

#: Fill opacity of a mask.
_ALPHA = 0.45
#: Rows of an image that are tinted at once.
_ROWS = 128
#: Characters of a name that are looked at for its label.
_LONGEST = 200
#: An image with more objects is crowded.
_CROWD = 12
_NO_MASK = MaskCrop(0, 0, np.zeros((0, 0), dtype=bool))


def draw_detections(
    image_rgb: np.ndarray,
    detections: AnyDetections,
    class_names: Sequence[str],
    *,
    min_size: int = 640,
    max_size: int | None = None,
    labels: Labels = "all",
    colors: Colors = "class",
    crops: Sequence[MaskCrop] | None = None,
) -> np.ndarray:
    """Draw detections on a copy of the image, with memory for one mask at a time.

    Args:
        image_rgb: (H, W, 3) uint8 RGB, at any scale.
        detections: of the image; no threshold is applied.
        class_names: name of each class index; an index beyond them is shown as a number.
        min_size: a smaller image is scaled up to about this longer side by a whole factor, to keep labels legible.
        max_size: a larger image is scaled down to this longer side before anything is drawn; None draws at full size.
        labels: which labels are drawn, with the score in percent.
        colors: one color a class or an instance.
        crops: the masks of the detections, if they are not in ``detections``.

    Returns:
        (H * k, W * k, 3) uint8 with an integer k >= 1, or smaller because of ``max_size``.
    """
    masks, size = detections.masks, detections.image_size

    def mask_of(index: int, height: int, width: int) -> MaskCrop:
        if crops is not None:
            return _resized(crops[index], size, height, width)
        if masks is None:
            return _NO_MASK
        return _resized(crop_mask(to_numpy(masks[index]).astype(bool, copy=False)), size, height, width)

    boxes, classes, scores = to_numpy(detections.boxes), detections.classes.tolist(), detections.scores.tolist()
    return _draw(image_rgb, size, boxes, classes, scores, class_names, mask_of, min_size, max_size, labels, colors)


def draw_annotations(
    image_rgb: np.ndarray,
    record: Record,
    class_names: Sequence[str],
    *,
    min_size: int = 640,
    max_size: int | None = None,
    labels: Labels = "all",
) -> np.ndarray:
    """Draw the annotations of an image as :func:`draw_detections` does; a mask is made when it is drawn."""
    annotations, size = record["annotations"], (record["height"], record["width"])

    def mask_of(index: int, height: int, width: int) -> MaskCrop:
        segmentation = annotations[index].get("segmentation")
        if isinstance(segmentation, dict):
            from pycocotools import mask as coco_mask

            return _resized(crop_mask(coco_mask.decode(segmentation).astype(bool)), size, height, width)
        scale = width / size[1], height / size[0]
        polygons = [np.asarray(p, float) * np.resize(scale, len(p)) for p in segmentation or []]
        return crop_mask(rasterize_polygons(polygons, height, width))

    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4).astype(float)
    boxes[:, 2:] += boxes[:, :2]
    classes = [a["category_id"] for a in annotations]
    return _draw(image_rgb, size, boxes, classes, None, class_names, mask_of, min_size, max_size, labels)


def draw_sample(
    sample: Sample, class_names: Sequence[str], *, bgr: bool, proposals: np.ndarray | None = None
) -> np.ndarray:
    """Draw a training image with its ground truth, or with ``proposals`` (P, 4) XYXY, as :func:`draw_detections` does.

    Args:
        bgr: whether the channels of the image are in BGR order.
    """
    pixels = to_numpy(sample["image"]).transpose(1, 2, 0)
    rgb = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, ::-1] if bgr else pixels
    if proposals is not None:
        classes = [0] * len(proposals)
        return _draw(
            rgb, rgb.shape, proposals, classes, None, (), lambda *_: _NO_MASK, labels="none", colors="instance"
        )
    targets = sample["targets"]
    size, classes = targets.image_size, targets.classes.tolist()
    bitmaps = [] if targets.masks is None else targets.masks.bitmaps(*size)
    crops = [crop_mask(bitmap) for bitmap in bitmaps] or [_NO_MASK] * len(targets)
    return _draw(rgb, size, to_numpy(targets.boxes), classes, None, class_names, lambda index, *_: crops[index])


def jpeg_bytes(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB pixels as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=86)
    return buffer.getvalue()


def _draw(
    image_rgb: np.ndarray,
    size: Sequence[int],
    boxes: np.ndarray,
    classes: Sequence[int],
    scores: Sequence[float] | None,
    class_names: Sequence[str],
    mask_of: Callable[[int, int, int], MaskCrop],
    min_size: int = 640,
    max_size: int | None = None,
    labels: Labels = "all",
    colors: Colors = "class",
) -> np.ndarray:
    """Boxes (N, 4) XYXY of an image of (height, width) ``size``, and masks by (index, height, width), on a copy."""
    image = Image.fromarray(np.ascontiguousarray(image_rgb))
    if max_size is not None:
        image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    width, height = image.size
    scale = max(1, round(min_size / max(height, width)))
    if scale > 1:
        image = image.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    boxes = boxes * np.array([image.width / size[1], image.height / size[0]] * 2)
    line = max(2, round(max(image.size) / 400))
    color_of = [class_color(i if colors == "instance" else c) for i, c in enumerate(classes)]
    # Large objects first: what lies in front of them stays visible.
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-areas, kind="stable").tolist()
    pixels = np.array(image)
    for i in order:
        _paint_mask(pixels, mask_of(i, height, width), scale, color_of[i], line)
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    for i in order:
        canvas.rectangle(_inside(boxes[i], image.size), outline=color_of[i], width=line)
    fit = labels == "fit" and len(boxes) > _CROWD
    font_size = max(13, round(max(image.size) / 48))
    taken: list[Box] = []
    best_first = range(len(boxes)) if scores is None else np.argsort(-np.array(scores), kind="stable").tolist()
    for i in () if labels == "none" else best_first:
        text = _class_text(classes[i], class_names, 0.45 * image.width, font_size)
        text += "" if scores is None else f" {scores[i]:.0%}"
        _draw_label(canvas, text, font_size, boxes[i], color_of[i], taken, image.size, fit)
    return np.array(image)


def _resized(crop: MaskCrop, size: tuple[int, int], height: int, width: int) -> MaskCrop:
    """The part of a mask of an image of (height, width) ``size`` in the image resized to (height, width)."""
    if size == (height, width) or 0 in crop.bitmap.shape:
        return crop
    y, x = height / size[0], width / size[1]
    rows, columns = crop.bitmap.shape
    small = max(round(columns * x), 1), max(round(rows * y), 1)
    bitmap = np.asarray(Image.fromarray(crop.bitmap).resize(small, Image.Resampling.NEAREST))
    return MaskCrop(round(crop.top * y), round(crop.left * x), bitmap)


def draw_grid(images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int, cell: int = 480) -> np.ndarray:
    """Several RGB images on white, each fitted into a square cell without distortion.

    Args:
        images: (H, W, 3) uint8 each, any sizes.
        titles: a line above each image.
        columns: cells a row.
        cell: side of a cell in pixels.
    """
    gap, font_size = 12, max(14, cell // 28)
    step, head = cell + gap, font_size + gap
    fitted = [ImageOps.contain(Image.fromarray(image), (cell, cell), Image.Resampling.LANCZOS) for image in images]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [max(fitted[i].height for i in row) for row in rows]
    sheet = Image.new("RGB", (gap + len(rows[0]) * step, gap + sum(heights) + len(rows) * (head + gap)), "white")
    canvas = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights):
        for left, i in zip(range(gap, sheet.width, step), row):
            text = _shorten(titles[i], cell, font_size)
            canvas.text((left, top), text, fill=(40, 40, 40), font=_font_for(text, font_size))
            sheet.paste(fitted[i], (left + (cell - fitted[i].width) // 2, top + head))
        top += height + head + gap
    return np.array(sheet)


def _inside(box: np.ndarray, size: tuple[int, int]) -> Box:
    """The box as Pillow wants it: inclusive corners within the image, never inverted."""
    x0, y0, x1, y1 = np.clip(box - np.array([0, 0, 1, 1]), 0, np.array([*size, *size]) - 1.0).tolist()
    return x0, y0, max(x0, x1), max(y0, y1)


def _paint_mask(pixels: np.ndarray, crop: MaskCrop, scale: int, color: Color, line: int) -> None:
    """Fill a mask translucently and draw its outline, in place on the scaled pixels."""
    bitmap = crop.bitmap
    if bitmap.size == 0:
        return
    # A margin, so that the outline of a cut-out is that of the object.
    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    top, left = max(crop.top - 2, 0), max(crop.left - 2, 0)
    bottom, right = min(crop.top + bitmap.shape[0] + 2, height), min(crop.left + bitmap.shape[1] + 2, width)
    part = in_window(crop, (left, top, right, bottom))
    stencil = Image.fromarray(part.astype(np.uint8) * 255)
    if scale > 1:
        # Blurred before it is cut at one half: the stairs of the small mask become a smooth line.
        stencil = stencil.resize((part.shape[1] * scale, part.shape[0] * scale), Image.Resampling.BICUBIC)
        stencil = stencil.filter(ImageFilter.GaussianBlur(0.6 * scale))
    inner = np.asarray(stencil) >= 128
    area = pixels[top * scale :, left * scale :][: inner.shape[0], : inner.shape[1]]
    tint(area, inner, color, _ALPHA)
    area[inner & ~_eroded(inner, line)] = color


def tint(pixels: np.ndarray, mask: np.ndarray, color: Color, alpha: float) -> None:
    """Mix ``color`` into the pixels of a (H, W) bool mask, in place, some rows at a time."""
    mixed = np.arange(256, dtype=np.uint8)[:, None] * (1 - alpha) + np.array(color, dtype=np.float32) * alpha
    table = mixed.astype(np.uint8).T.ravel().tolist()
    for top in range(0, len(mask), _ROWS):
        rows = pixels[top : top + _ROWS]
        plain = Image.fromarray(np.ascontiguousarray(rows))
        stencil = Image.fromarray(np.ascontiguousarray(mask[top : top + _ROWS]).view(np.uint8) * 255)
        rows[:] = np.asarray(Image.composite(plain.point(table), plain, stencil))


def _eroded(mask: np.ndarray, reach: int) -> np.ndarray:
    """The pixels whose neighbors up to ``reach`` away, diagonal ones too, are in the mask or outside the image."""
    out = np.pad(mask, reach, constant_values=True)
    for _ in range(2):  # down the columns, then along the rows
        covered = 1
        while covered < 2 * reach + 1:
            step = min(covered, 2 * reach + 1 - covered)
            out = out[:-step] & out[step:]
            covered += step
        out = out.T
    return out


def _class_text(index: int, class_names: Sequence[str], width: float, font_size: int) -> str:
    """The class name cut to ``width`` pixels, or a number where there is no name or no font that can write it."""
    name = class_names[index] if index < len(class_names) else ""
    writable = name.strip() and _font_file(name[:_LONGEST])[1]
    return _shorten(name, width, font_size) if writable else f"class {index}"


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    text: str,
    font_size: int,
    box: np.ndarray,
    color: Color,
    taken: list[Box],
    size: tuple[int, int],
    fit: bool,
) -> None:
    """Write a label on a filled ground at the box, inside the image, where it hides the fewest labels of ``taken``.

    With ``fit`` a label is left out that is larger than its box or would hide another one.
    """
    font = _font_for(text, font_size)
    pad = max(2, font_size // 5)
    left, _, right, _ = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * pad, font_size + 2 * pad
    x0, y0, x1, y1 = _inside(box, size)
    if fit and width * height > (x1 - x0) * (y1 - y0):
        return
    spots = [(x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1), (x0, y1 - height)]
    spots += [(x0, y0 + k * height) for k in (1, 2)]
    inside = np.clip(spots, 0, np.maximum(np.array(size) - (width, height), 0)).tolist()
    placed: list[Box] = [(x, y, x + width, y + height) for x, y in inside]
    # min() keeps the first of equals: the order above is the order of preference.
    spot = min(placed, key=lambda s: sum(_overlap(s, other) for other in taken))
    if fit and any(_overlap(spot, other) for other in taken):
        return
    taken.append(spot)
    canvas.rounded_rectangle(spot, radius=pad, fill=color)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 150
    middle = (spot[0] + pad - left, spot[1] + height / 2)
    canvas.text(middle, text, anchor="lm", font=font, fill="white" if dark else "black")


def _overlap(a: Box, b: Box) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _shorten(text: str, width: float, font_size: int) -> str:
    """The text, cut with an ellipsis where it is wider than ``width`` pixels."""
    cut = len(text) > _LONGEST
    text = " ".join(text[:_LONGEST].split()) or "?"
    font = _font_for(text, font_size)
    if font.getlength(text) <= width and not cut:
        return text
    # The longest that fits: the first length that does not, less one.
    length = bisect.bisect_right(range(2, len(text) + 1), width, key=lambda n: font.getlength(text[:n] + "…"))
    return text[: length + 1] + "…"


@functools.lru_cache(maxsize=256)
def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; another installed font where it lacks a character (CJK ...)."""
    return ImageFont.truetype(_font_file(text)[0], size)


@functools.lru_cache(maxsize=256)
def _font_file(text: str) -> tuple[str, bool]:
    """The font file that writes most of the characters of ``text``, and whether it writes all of them."""
    from matplotlib import font_manager

    needed = frozenset(ord(c) for c in text if not c.isspace())
    default = str(font_manager.findfont("DejaVu Sans"))
    if needed <= _characters(default):
        return default, True
    # "Last Resort" claims every character and draws a placeholder for each.
    found = font_manager.fontManager.ttflist
    candidates = sorted({f.fname for f in found if f.style == "normal" and "resort" not in f.name.lower()})
    best = max([default, *candidates], key=lambda file: len(needed & _characters(file)))
    return best, needed <= _characters(best)


@functools.lru_cache(maxsize=1024)
def _characters(path: str) -> frozenset[int]:
    """Code points that a font file can draw."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()
