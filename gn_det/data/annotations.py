"""Check single COCO annotations before any number reaches the mask API.

pycocotools trusts its input: a NaN vertex takes the process down, a vertex far outside takes gigabytes, an RLE of the
wrong length writes past its buffer or gives a transposed mask. So every number is checked here first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gn_det.data.entries import LARGEST_ID
from gn_det.data.problems import Problems, Where
from gn_det.data.records import Entry
from gn_det.text import one_line, shown, some

#: The COCO mask API upsamples polygon edges; a vertex more than this many image sides outside is an error.
FAR_OUTSIDE = 2.0
#: A box and its mask's box are equal if no edge differs by more than this.
SAME_PIXELS = 1.0


class Defect(Exception):
    """Reason why an annotation is unusable: a key of ``problems.KINDS`` and the details for its text."""

    def __init__(self, kind: str, *details: Any) -> None:
        super().__init__(kind, *details)
        self.kind, self.details = kind, details


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite real number (not a bool)."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # integers beyond the range of float
        return False


def whole(value: Any) -> Any:
    """Return ``77`` for ``77.0``, and anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def resolve_id(value: Any, known: Container[Any]) -> Any:
    """Return the id in ``known`` that ``value`` (``77``, ``77.0`` or ``"77"``) stands for, or None."""
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):  # True equals 1
        return None
    if value in known:
        return value
    other = str(value) if isinstance(value, int) else number_in(value)
    return other if other is not None and other in known else None


def number_in(text: str) -> int | None:
    """Parse ``text`` as an integer, or return None."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def check_box(bbox: Any, height: int, width: int) -> list[float]:
    """Return the XYWH box as written, if it covers part of the image.

    Raises:
        Defect: not four finite numbers, no area, entirely outside the image, or reaching far outside it.
    """
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4 or not all(map(is_number, bbox)):
        raise Defect("bbox-format", one_line(bbox, 60))
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        raise Defect("bbox-no-area", one_line(bbox, 60))
    if min(x + w, width) - max(x, 0) <= 0 or min(y + h, height) - max(y, 0) <= 0:
        raise Defect("bbox-outside", one_line(bbox, 60), width, height)
    far_x, far_y = FAR_OUTSIDE * width, FAR_OUTSIDE * height
    if min(x + far_x, y + far_y) < 0 or x + w > width + far_x or y + h > height + far_y:
        raise Defect("bbox-far", one_line(bbox, 60), width, height)
    return list(bbox)


def check_segmentation(segmentation: Any, height: int, width: int) -> tuple[Any, int]:
    """Verify a segmentation and return it as a json holds polygons or compressed RLE.

    Returns:
        The segmentation (None if the json has none), and how many polygon parts were dropped because they have fewer
        than 3 points or an odd number of coordinates. Detectron2 drops the same ones.

    Raises:
        Defect: nothing usable is left, or a number is unsafe for the mask API.
    """
    if not segmentation:
        return None, 0
    if isinstance(segmentation, dict):
        return _check_rle(segmentation, height, width), 0
    if not isinstance(segmentation, list) or not all(isinstance(piece, (list, tuple)) for piece in segmentation):
        raise Defect("segmentation-format")
    good = [_check_polygon(piece, height, width) for piece in usable_pieces(segmentation)]
    if not good:
        raise Defect("polygon-short")
    return good, len(segmentation) - len(good)


def usable_pieces(pieces: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the polygon pieces that :func:`check_segmentation` keeps, unchanged."""
    return [piece for piece in pieces if len(piece) >= 6 and len(piece) % 2 == 0]


def _check_polygon(piece: Sequence[Any], height: int, width: int) -> list[float]:
    try:
        points = np.asarray(piece)
    except (ValueError, OverflowError):
        raise Defect("polygon-no-number") from None
    if points.ndim != 1 or points.dtype.kind not in "iuf":
        raise Defect("polygon-no-number")
    points = points.astype(np.int64 if points.dtype.kind == "i" else np.float64, copy=False)
    # A vertex may be outside (tools draw past the border), but not by a multiple of the image size. NaN fails, too.
    corners, size = points.reshape(-1, 2), np.array((width, height), float)
    near = (corners >= -FAR_OUTSIDE * size) & (corners <= (1 + FAR_OUTSIDE) * size)
    if not near.all():
        if not np.isfinite(points).all():
            raise Defect("polygon-no-number")
        x, y = corners[near.all(axis=1).argmin()]
        raise Defect("polygon-far", x, y, width, height)
    flat: list[float] = points.tolist()
    return flat


def mask_box(segmentation: Any) -> tuple[float, float, float, float]:
    """Return the XYXY box of a checked segmentation."""
    if isinstance(segmentation, dict):
        x, y, w, h = coco_mask.toBbox(segmentation).tolist()
        return x, y, x + w, y + h
    points = np.concatenate(segmentation).astype(float).reshape(-1, 2)
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def mask_area(segmentation: Any, height: int, width: int) -> float:
    """Count the pixels of a checked segmentation."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return float(coco_mask.area(segmentation))


def covers_no_pixel(segmentation: Any, height: int, width: int) -> bool:
    """Return whether polygons are so thin or far outside that their mask is empty (RLE is checked when read)."""
    if isinstance(segmentation, dict):
        return False
    for piece in segmentation:
        x0, y0, x1, y1 = mask_box([piece])
        if polygon_area(piece) > x1 - x0 + y1 - y0:  # thicker than a pixel; this decides most at a tenth of the time
            return False
    return mask_area(segmentation, height, width) == 0


def polygon_area(polygon: Sequence[float]) -> float:
    """Return the area of a flat polygon x0, y0, x1, y1 ... in square pixels."""
    points = np.asarray(polygon, float).view(complex)  # conj(a) * b has the cross product of a and b as imaginary part
    return abs(float((np.vdot(points[:-1], points[1:]) + points[-1].conjugate() * points[0]).imag)) / 2


def _check_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise Defect("rle-size", one_line(size, 60), [height, width])
    runs = _runs(counts) if isinstance(counts, list) else decode_counts(counts)
    if runs.min(initial=0) < 0:
        raise Defect("rle-format", "counts are negative")
    if int(runs.sum()) != height * width:
        raise Defect("rle-length", int(runs.sum()), height * width)
    if int(runs[1::2].sum()) == 0:
        raise Defect("rle-empty")
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _runs(counts: list[Any]) -> np.ndarray:
    with suppress(ValueError, OverflowError):
        runs = np.asarray(counts)
        if runs.ndim == 1 and runs.dtype.kind in "iuf" and (np.abs(runs) < 2**32).all() and (runs % 1 == 0).all():
            return runs.astype(np.int64)
    raise Defect("rle-format", "counts are not integers below 2^32")


def decode_counts(counts: Any) -> np.ndarray:
    """Decode the run lengths of a compressed COCO RLE string without pycocotools.

    Each run is a signed number in groups of 5 bits, lowest first, one character (offset 48) per group. Bit 5 says that
    another group follows; bit 4 of the last one is the sign. From the fourth run on, a number is the difference from
    the run two places before.

    Raises:
        Defect: characters outside the alphabet, or a number that is cut off.
    """
    if not isinstance(counts, (str, bytes)):
        raise Defect("rle-format", "counts are neither a list of run lengths nor a compressed string")
    data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    raw = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(raw) == 0 or raw.min() < 0 or raw.max() > 63:
        raise Defect("rle-format", "counts are empty or contain invalid characters")
    last = (raw & 0x20) == 0
    if not last[-1]:
        raise Defect("rle-format", "counts end in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 9:
        raise Defect("rle-format", "counts contain a number larger than any image")
    place = np.arange(len(raw)) - np.repeat(starts, lengths)
    values = np.add.reduceat((raw & 0x1F) << (5 * place), starts)
    values -= np.where(raw[ends] & 0x10, np.left_shift(np.int64(1), 5 * lengths), 0)
    runs: np.ndarray = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


class AnnotationReader:
    """Checks and repairs json annotations one by one, for training, evaluation and the check."""

    def __init__(self, category_ids: Sequence[int], problems: Problems) -> None:
        self.category_ids = category_ids
        self.index_of = {category: i for i, category in enumerate(category_ids)}
        self.problems = problems

    def read(self, raw: dict[str, Any], image: dict[str, Any]) -> Entry | None:
        """Return a checked annotation, or None if it is dropped and reported to ``problems``."""
        where = Where(image["id"], image["file_name"], raw.get("id"))
        try:
            return self._read(raw, where, image["height"], image["width"])
        except Defect as defect:
            self.problems.drop(defect.kind, where, *defect.details)
            return None

    def _read(self, raw: dict[str, Any], where: Where, height: int, width: int) -> Entry:
        given = raw.get("category_id")
        category = resolve_id(given, self.index_of)
        if category is None:
            raise Defect("category-unknown", shown(given), some([str(c) for c in self.category_ids]))
        if type(given) is not int:
            self.problems.repair("id-type", where)
        if raw.get("ignore"):
            raise Defect("ignore")
        iscrowd = raw.get("iscrowd")
        if iscrowd is not None and iscrowd not in (0, 1):
            raise Defect("iscrowd", shown(iscrowd))
        segmentation, left_out = None, 0
        try:
            bbox = check_box(raw.get("bbox"), height, width)
        except Defect as unusable:
            if not raw.get("segmentation"):
                raise
            segmentation, left_out = check_segmentation(raw["segmentation"], height, width)
            bbox = _box_of(segmentation, height, width, None if raw.get("bbox") is None else unusable)
            self.problems.repair("bbox-missing" if raw.get("bbox") is None else "bbox-unusable", where)
        else:
            segmentation, left_out = check_segmentation(raw.get("segmentation"), height, width)
        if iscrowd is None:
            self.problems.repair("iscrowd-missing", where)
        if left_out:
            self.problems.repair("polygon-piece", where, left_out)
        area: Any = raw.get("area")
        empty = segmentation is not None and covers_no_pixel(segmentation, height, width)
        if empty:
            self.problems.repair("polygon-empty", where)
        if not is_number(area) or area < 0 or (area == 0 and not empty):
            self.problems.repair("area-missing", where)
            area = float(bbox[2] * bbox[3]) if segmentation is None else mask_area(segmentation, height, width)
        area = float(area) if area > LARGEST_ID else area  # only the json module reads longer integers
        return Entry(raw["id"], category, bbox, area, int(iscrowd or 0), segmentation)


def _box_of(segmentation: Any, height: int, width: int, unusable: Defect | None) -> list[float]:
    """Return the box of the mask, in place of a missing or ``unusable`` one."""
    if unusable is not None and covers_no_pixel(segmentation, height, width):
        raise unusable
    try:
        x0, y0, x1, y1 = mask_box(segmentation)
        return check_box([x0, y0, x1 - x0, y1 - y0], height, width)
    except Defect as defect:
        raise unusable or defect from None


def fits_as_written(bbox: Sequence[float], mask: Sequence[float]) -> bool:
    """Return whether the XYWH ``bbox`` equals the XYXY box of its mask, to a pixel."""
    x, y, w, h = bbox
    return max(abs(p - q) for p, q in zip((x, y, x + w, y + h), mask)) <= SAME_PIXELS
