"""Checks of single COCO annotations, before any number reaches the mask API.

pycocotools trusts its input: a NaN vertex takes the process down, a vertex far outside takes gigabytes, an RLE of the
wrong length writes past its buffer or gives a transposed mask. So every number is looked at here first. Functions
return the cleaned value, or raise :class:`Defect` with what is wrong and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gn_det.data.records import Segmentation
from gn_det.text import one_line

#: The COCO mask API upsamples polygon edges; beyond this many pixels outside the image a vertex is surely an error.
_FAR_OUTSIDE = 2.0


class Defect(Exception):
    """What is wrong with one annotation; the message says what to do, ``kind`` is a key of ``problems.KINDS``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def is_number(value: Any) -> bool:
    """True for finite real numbers (bool is not one)."""
    if type(value) is float:
        return math.isfinite(value)
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # whole numbers beyond the range of float
        return False


def check_box(bbox: Any, height: int, width: int) -> list[float]:
    """The XYWH box as written, if some of it covers the image.

    Raises:
        Defect: not four finite numbers, no area, or wholly outside the image.
    """
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4:
        raise Defect("bbox-format", f"bbox {_short(bbox)} is not [x, y, width, height]")
    if not all(map(is_number, bbox)):
        raise Defect("bbox-format", f"bbox {_short(bbox)} has values that are not finite numbers")
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        raise Defect(
            "bbox-no-area", f"bbox {_short(bbox)} has no area (COCO boxes are [x, y, width, height]): fix or remove it"
        )
    if min(x + w, width) - max(x, 0) <= 0 or min(y + h, height) - max(y, 0) <= 0:
        raise Defect("bbox-outside", f"bbox {_short(bbox)} lies outside the {width}x{height} image: fix or remove it")
    far_x, far_y = _FAR_OUTSIDE * width, _FAR_OUTSIDE * height
    if min(x + far_x, y + far_y) < 0 or x + w > width + far_x or y + h > height + far_y:
        raise Defect(
            "bbox-far",
            f"bbox {_short(bbox)} reaches far outside the {width}x{height} image: coordinates are pixels; fix or "
            "remove it",
        )
    return list(bbox)


def check_segmentation(segmentation: Any, height: int, width: int) -> tuple[Segmentation | None, int]:
    """Polygons or compressed RLE, verified.

    Returns:
        The segmentation (None where the json has none) and the number of polygon pieces left out because they have
        fewer than 3 points or an odd number of coordinates, as Detectron2 leaves them out.

    Raises:
        Defect: nothing usable is left, or a number that must not reach the mask API.
    """
    if not segmentation:
        return None, 0
    if isinstance(segmentation, dict):
        return _check_rle(segmentation, height, width), 0
    if isinstance(segmentation, list):
        return _check_polygons(segmentation, height, width)
    raise Defect(
        "segmentation-format",
        f"segmentation is a {type(segmentation).__name__}: give a list of polygons or an RLE (size, counts)",
    )


def usable_pieces(pieces: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The polygon pieces that :func:`check_segmentation` keeps, as they stand in the json."""
    return [piece for piece in pieces if len(piece) >= 6 and len(piece) % 2 == 0]


def _check_polygons(pieces: list[Any], height: int, width: int) -> tuple[list[np.ndarray], int]:
    if all(map(is_number, pieces)):
        raise Defect(
            "segmentation-format",
            "segmentation is a flat list of numbers: polygons are a list of lists [[x0, y0, x1, y1, ...]]",
        )
    good, odd, short = [], 0, 0
    for piece in pieces:
        if not isinstance(piece, (list, tuple)):
            raise Defect("segmentation-format", "segmentation is not a list of polygons [[x0, y0, x1, y1, ...], ...]")
        try:
            points = np.asarray(piece)
        except (ValueError, OverflowError):
            points = np.asarray(None)
        if len(piece) and (points.ndim != 1 or points.dtype.kind not in "iuf"):
            raise Defect(
                "polygon-no-number",
                "segmentation has polygon coordinates that are not numbers: a polygon is [x0, y0, x1, y1, ...]",
            )
        if len(piece) % 2:
            odd += 1
        elif len(piece) < 6:
            short += 1
        else:
            good.append(_check_vertices(points, height, width))
    if not good:
        what = "an odd number of coordinates" if odd and not short else "fewer than 3 points"
        raise Defect(
            "polygon-short", f"segmentation has no usable polygon ({what}): draw it again or remove the annotation"
        )
    return good, odd + short


def _check_vertices(points: np.ndarray, height: int, width: int) -> np.ndarray:
    points = points.astype(np.int64 if points.dtype.kind == "i" else np.float64, copy=False)
    # Nearly all polygons pass here, with two reductions; NaN fails any comparison.
    side = min(height, width)
    low, high = np.minimum.reduce(points), np.maximum.reduce(points)
    if low >= -_FAR_OUTSIDE * side and high <= (1 + _FAR_OUTSIDE) * side:
        return points
    if not np.isfinite(points).all():
        raise Defect("polygon-no-number", "segmentation has a NaN or infinite vertex: fix or remove it")
    xs, ys = points[0::2], points[1::2]
    # A vertex may lie outside (tools draw past the border), but not a multiple of the image away.
    low_x, high_x = -_FAR_OUTSIDE * width, (1 + _FAR_OUTSIDE) * width
    low_y, high_y = -_FAR_OUTSIDE * height, (1 + _FAR_OUTSIDE) * height
    if xs.min() < low_x or xs.max() > high_x or ys.min() < low_y or ys.max() > high_y:
        worst = int(np.argmax(np.maximum(np.abs(xs - width / 2), np.abs(ys - height / 2))))
        raise Defect(
            "polygon-far",
            f"segmentation has a vertex at ({xs[worst]:g}, {ys[worst]:g}), far outside the {width}x{height} image: "
            f"coordinates are pixels; fix or remove it",
        )
    return points


def mask_box(segmentation: Segmentation) -> tuple[float, float, float, float]:
    """XYXY box of a checked segmentation."""
    if isinstance(segmentation, dict):
        from pycocotools import mask as coco_mask

        x, y, w, h = coco_mask.toBbox(segmentation).tolist()
        return x, y, x + w, y + h
    points = segmentation[0] if len(segmentation) == 1 else np.concatenate(segmentation)
    xs, ys = points[0::2], points[1::2]
    return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())


def mask_area(segmentation: Segmentation, height: int, width: int) -> float:
    """Pixels of a checked segmentation."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        return float(coco_mask.area(segmentation))
    rles = coco_mask.frPyObjects([p.tolist() for p in segmentation], height, width)
    return float(coco_mask.area(coco_mask.merge(rles)))


def covers_no_pixel(segmentation: Segmentation, height: int, width: int) -> bool:
    """Whether polygons are so thin or so far out that their mask is empty (an RLE is checked when it is read)."""
    if isinstance(segmentation, dict):
        return False
    for piece in segmentation:
        points = piece.astype(np.float64, copy=False).view(np.complex128)
        # twice the area; one call for all but the closing edge
        twice = abs(np.vdot(points[:-1], points[1:]).imag + (points[-1].conjugate() * points[0]).imag)
        if twice > 2 * (width + height):  # thicker than a pixel, however long it is
            return False
        x0, y0, x1, y1 = mask_box([piece])
        if twice > 2 * (x1 - x0 + y1 - y0):
            return False
    return mask_area(segmentation, height, width) == 0


def _check_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if size is None or counts is None:
        raise Defect("rle-format", "segmentation is an RLE without size or counts: give both, or polygons")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(is_number(v) for v in size):
        raise Defect("rle-size", f"RLE size {_short(size)} is not [height, width]")
    if tuple(size) != (height, width):
        swapped = " (it looks like [width, height]: swap it)" if tuple(size) == (width, height) else ""
        raise Defect(
            "rle-size", f"RLE size {_short(size)} is not the image's [height, width] {[height, width]}{swapped}"
        )
    runs = _runs_from_list(counts) if isinstance(counts, list) else decode_counts(counts)
    if len(runs) and int(runs.min()) < 0:
        raise Defect("rle-format", "RLE counts are negative: the mask is damaged, encode it again")
    total = int(runs.sum())
    if total != height * width:
        raise Defect(
            "rle-length",
            f"RLE counts cover {total} pixels, the image has {height * width}: the mask is damaged or belongs to "
            f"another image size, encode it again",
        )
    if int(runs[1::2].sum()) == 0:
        raise Defect("rle-empty", "RLE has no foreground pixel: remove the annotation")
    return {"size": [height, width], "counts": encode_counts(runs) if isinstance(counts, list) else _as_bytes(counts)}


def _runs_from_list(counts: list[Any]) -> np.ndarray:
    if not all(is_number(c) and c == int(c) for c in counts):
        raise Defect("rle-format", "RLE counts are not whole numbers: encode the mask again")
    if any(abs(c) > 2**40 for c in counts):
        raise Defect("rle-format", "RLE counts are larger than any image: encode the mask again")
    return np.asarray(counts, dtype=np.int64)


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def decode_counts(counts: Any) -> np.ndarray:
    """Run lengths of a compressed COCO RLE string, without pycocotools.

    The format: each run is a signed number in groups of 5 bits, lowest first, one character (offset 48) a group, bit 5
    meaning that another follows and bit 4 of the last one being the sign; from the fourth run on, a number is the
    difference to the run two places before.

    Raises:
        Defect: characters outside the alphabet, or a number that is cut off.
    """
    if not isinstance(counts, (str, bytes)):
        raise Defect(
            "rle-format", f"RLE counts are {type(counts).__name__}: give a list of run lengths or a compressed string"
        )
    try:
        raw = np.frombuffer(_as_bytes(counts), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise Defect(
            "rle-format", "RLE counts hold characters that the format does not have: encode the mask again"
        ) from None
    if len(raw) == 0 or raw.min() < 0 or raw.max() > 63:
        raise Defect(
            "rle-format", "RLE counts are empty or hold characters that the format does not have: encode the mask again"
        )
    last = (raw & 0x20) == 0
    if not last[-1]:
        raise Defect("rle-format", "RLE counts end inside a number: the string was cut off, encode the mask again")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 9:
        raise Defect("rle-format", "RLE counts hold a number larger than any image: encode the mask again")
    place = np.arange(len(raw)) - np.repeat(starts, lengths)
    values = np.add.reduceat((raw & 0x1F) << (5 * place), starts)
    values -= np.where(raw[ends] & 0x10, np.left_shift(np.int64(1), 5 * lengths), 0)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def encode_counts(runs: Sequence[int] | np.ndarray) -> bytes:
    """Compressed COCO RLE string of run lengths; the inverse of :func:`decode_counts`."""
    out = bytearray()
    runs = [int(r) for r in runs]
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            group = value & 0x1F
            value >>= 5
            done = (value == 0 and not group & 0x10) or (value == -1 and group & 0x10)
            out.append((group if done else group | 0x20) + 48)
            if done:
                break
    return bytes(out)


def _short(value: Any) -> str:
    return one_line(value, 60)
