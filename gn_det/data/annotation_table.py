"""The annotations that training uses, as numeric columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from msgspec.structs import asdict

from gn_det.data.annotations import FAR_OUTSIDE, SAME_PIXELS, AnnotationReader, mask_box
from gn_det.data.coco_json import CocoJson
from gn_det.data.problems import NOWHERE, Problems

#: A set is taken for [x1, y1, x2, y2] when at least the first share of its boxes leaves the image as XYWH, and the
#: second fits as corners.
_LEAVING, _CORNERS = 0.2, 0.99
#: The same judged by masks: share of boxes that match their mask's corners, to a pixel, but not its XYWH box.
_MASK_CORNERS = 0.5


@dataclass
class AnnotationTable:
    """Checked annotations, grouped by image."""

    images: Sequence[dict[str, Any]]  # the images; M annotations in all
    position: np.ndarray  # (M,) int64 position in the json
    image: np.ndarray  # (M,) int64 index into ``images``, ascending
    id: np.ndarray  # (M,) int64
    category: np.ndarray  # (M,) int64, contiguous
    crowd: np.ndarray  # (M,) bool
    bbox: np.ndarray  # (M, 4) float64 XYWH
    hull: np.ndarray  # (M, 4) float64 XYXY box of the mask, NaN without a mask
    as_written: np.ndarray  # (M,) bool, whether the box is the json's own
    spans: np.ndarray  # (M, 2) int64 start and end of each annotation in the text of the entries

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, rows: np.ndarray) -> AnnotationTable:
        """The rows chosen by a mask or by indices."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return AnnotationTable(**{k: v[rows] if isinstance(v, np.ndarray) else v for k, v in values.items()})

    @property
    def has_mask(self) -> np.ndarray:
        """(M,) bool."""
        return np.asarray(np.isfinite(self.hull[:, 0]))

    @property
    def sizes(self) -> np.ndarray:
        """(M, 2) width and height of the image of each annotation."""
        return np.take(image_sizes(self.images), self.image, axis=0)

    def bounds(self) -> np.ndarray:
        """Start row of each image, and the end of the last one."""
        return np.searchsorted(self.image, np.arange(len(self.images) + 1))


def image_sizes(images: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, 2) int64 width and height, at most 2^31."""
    sizes = [(min(i["width"], 2**31), min(i["height"], 2**31)) for i in images]
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def check_annotations(content: CocoJson, images: Sequence[dict[str, Any]], problems: Problems) -> AnnotationTable:
    """Check the annotations of ``images``, which are some of ``content.images`` in the same order.

    Sound annotations pass in bulk; the rest are checked one by one, and reported to ``problems``. What is read from
    them is appended to the text of ``content.entries``.
    """
    reader = AnnotationReader(content.category_ids, problems)
    wanted = {image["id"]: i for i, image in enumerate(images)}
    index = np.array([wanted.get(image["id"], -1) for image in content.images] + [-1])  # the last for those without
    image = index[content.image_of]
    position = np.flatnonzero(image >= 0)
    position = position[np.argsort(image[position], kind="stable")]
    entries = content.entries
    category = np.array([reader.index_of.get(c, -1) for c in entries.category_id[position].tolist()], np.int64)
    columns = {name: getattr(entries, name)[position] for name in ("id", "crowd", "bbox", "hull", "spans")}
    as_written = np.ones(len(position), bool)
    table = AnnotationTable(images, position, image[position], category=category, as_written=as_written, **columns)
    good = entries.sound[position] & (category >= 0) & _inside(table) & ~np.isin(position, list(content.changed))
    keep = np.ones(len(position), bool)
    for row in np.flatnonzero(~good).tolist():
        raw = content.annotation(int(position[row]))
        entry = reader.read(raw, images[int(table.image[row])])
        keep[row] = entry is not None
        if entry is not None:
            table.id[row], table.category[row] = entry.id, reader.index_of[entry.category_id]
            table.crowd[row], table.bbox[row] = entry.iscrowd, entry.bbox
            table.hull[row] = np.nan if entry.segmentation is None else mask_box(entry.segmentation)
            table.as_written[row] = raw.get("bbox") == entry.bbox
            table.spans[row] = entries.append(json.dumps(asdict(entry)).encode())
    return table[keep]


def _inside(table: AnnotationTable) -> np.ndarray:
    """(M,) bool: the box covers part of its image, and neither box nor mask reaches far outside.

    Same rule as :func:`gn_det.data.annotations.check_box` and ``check_segmentation``, except for a few masks that reach
    far outside on the longer side only.
    """
    size, low, high = table.sizes, table.bbox[:, :2], table.bbox[:, :2] + table.bbox[:, 2:]
    good = np.minimum(high, size) - np.maximum(low, 0) > 0
    good &= (low + FAR_OUTSIDE * size >= 0) & (high <= size + FAR_OUTSIDE * size)
    side = size.min(axis=1, keepdims=True)
    far = (table.hull[:, :2] < -FAR_OUTSIDE * side) | (table.hull[:, 2:] > (1 + FAR_OUTSIDE) * side)
    return np.asarray((good & ~far).all(axis=1))


def refuse_corners(table: AnnotationTable, problems: Problems) -> None:
    """Refuse a set whose boxes are written as [x1, y1, x2, y2].

    Either most boxes match their masks' corners, or many leave the image as XYWH and all fit as corners.
    """
    table = table[table.as_written & ~table.crowd]
    size, first, last = table.sizes, table.bbox[:, :2], table.bbox[:, 2:]
    # Tools are off by a few pixels at the border, never by this much.
    leaving = np.count_nonzero((first + last > 1.1 * size + 1).any(axis=1))
    fits = ((first >= 0) & (first < last) & (last <= size + 1)).all(axis=1)
    corners, boxes, masks = np.count_nonzero(fits), len(table), np.count_nonzero(table.has_mask)
    as_corners = np.abs(table.bbox - table.hull).max(axis=1, initial=0) <= SAME_PIXELS
    as_box = np.abs(np.hstack([first, first + last]) - table.hull).max(axis=1, initial=0) <= SAME_PIXELS
    mask_corners = np.count_nonzero(fits & as_corners & ~as_box)
    if mask_corners >= max(2, _MASK_CORNERS * masks):
        why = f"{mask_corners} of {masks} boxes match the corners of their masks"
    elif leaving >= max(2, _LEAVING * boxes) and corners >= _CORNERS * boxes:
        why = f"{leaving} of {boxes} boxes leave their image as XYWH, {corners} fit as corners"
    else:
        return
    problems.refuse("bbox-corners", NOWHERE, why)
