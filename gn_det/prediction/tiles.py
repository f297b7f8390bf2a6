"""Large images in overlapping tiles: read windows of a file, and join the objects of all tiles across seams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from gn_det.data.image import ImageReader
from gn_det.data.tiff_windows import TiffWindows, open_windows
from gn_det.errors import ConfigError
from gn_det.prediction.pipeline import in_thread
from gn_det.prediction.predictor import Predictor, Selection, crops_of, nms
from gn_det.structures import ArrayDetections, MaskCrop, box_iou, in_window
from gn_det.text import count

#: XYXY in image pixels.
Window = tuple[int, int, int, int]

#: Two detections are one object if they agree so well where their tiles overlap (IoU).
_SAME = 0.5
#: A box that ends so close to the border of its tile is cut by it (share of the tile's side).
_CUT = 0.005
_SMALLEST = 64
#: Side of the windows that a thumbnail is made of.
_BLOCK = 2048


@dataclass(frozen=True)
class Tiling:
    """Square tiles of ``size`` pixels that overlap the next one by ``overlap`` of their side."""

    size: int = 1024
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.size < _SMALLEST:
            raise ConfigError(f"tiles of {self.size} pixels are too small; give {_SMALLEST} or more")
        if not 0 <= self.overlap <= 0.9:
            raise ConfigError(f"an overlap of {self.overlap:g} is out of range; give 0 to 0.9 of a tile's side")

    def windows(self, width: int, height: int) -> list[Window]:
        """Tiles of one size, row by row; the last of a row or column ends at the border of the image."""
        w, h = min(self.size, width), min(self.size, height)
        return [(x, y, x + w, y + h) for y in self._starts(height) for x in self._starts(width)]

    def _starts(self, length: int) -> list[int]:
        last = max(length - self.size, 0)
        step = max(round(self.size * (1 - self.overlap)), 1)
        return [*range(0, last, step), last]


class LargeImage:
    """RGB windows of an image file. A TIFF made of tiles is read by these; any other file is decoded once, whole.

    Attributes:
        size: (width, height) in pixels.
    """

    def __init__(self, path: Path, reader: ImageReader) -> None:
        """Open ``path``; raises ImageError where it cannot be read."""
        self._source: TiffWindows | Image.Image = open_windows(path, reader) or reader.decode(path)
        self.size = self._source.size

    def window(self, window: Window) -> np.ndarray:
        """Return (h, w, 3) uint8 RGB pixels."""
        if isinstance(self._source, TiffWindows):
            return self._source.read(window)
        return np.asarray(self._source.crop(window))

    def thumbnail(self, limit: int) -> np.ndarray:
        """Return the image, shrunk by a whole factor so that its longer side is at most ``limit`` pixels."""
        width, height = self.size
        factor = -(-max(width, height) // limit)
        out = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
        block = max(_BLOCK // factor, 1) * factor
        for y in range(0, height, block):
            for x in range(0, width, block):
                pixels = self.window((x, y, min(x + block, width), min(y + block, height)))
                small = np.asarray(Image.fromarray(pixels).reduce(factor))
                out[y // factor :, x // factor :][: small.shape[0], : small.shape[1]] = small
        return out


class Found(NamedTuple):
    """What was found on an image: detections, the crops of their masks, the best score of all, and remarks."""

    detections: ArrayDetections
    crops: list[MaskCrop] | None
    best: float
    notes: list[str]


@dataclass
class _Piece:
    """A detection of one tile in pixels of the image; ``cut`` where the border of its tile goes through it."""

    tile: int
    box: np.ndarray
    score: float
    label: int
    crop: MaskCrop | None
    cut: bool


def detect_tiles(predictor: Predictor, image: LargeImage, tiling: Tiling, keep: Selection) -> Found:
    """Detect on every tile and join what is one object, or raise ImageError for a part that cannot be decoded.

    Detections of two tiles are one object if they have one class and agree where the tiles overlap. A whole object wins
    over its cut parts; of parts alone the union is taken. A part that another tile sees whole and does not confirm is
    dropped.
    """
    width, height = image.size
    windows = tiling.windows(width, height)
    pieces: list[_Piece] = []
    best = 0.0
    for tile, loading in enumerate(in_thread(lambda window: predictor.sample(image.window(window)), windows)):
        found = predictor.infer(loading.result())
        best = max(best, float(found.scores.max()) if len(found) else 0.0)
        pieces += _pieces(keep(found), tile, windows[tile], (width, height))
    kept, joined = _join(pieces, windows)
    kept.sort(key=lambda piece: -piece.score)
    boxes = np.array([p.box for p in kept], np.float32).reshape(-1, 4)
    scores = np.array([p.score for p in kept], np.float32)
    if keep.agnostic_iou is not None:
        chosen = nms(boxes, keep.agnostic_iou)
        kept, boxes, scores = [kept[i] for i in chosen.tolist()], boxes[chosen], scores[chosen]
    labels = np.array([p.label for p in kept], np.int64)
    crops = [p.crop for p in kept if p.crop is not None]
    notes = []
    if joined:
        overlap = round(tiling.size * tiling.overlap)
        notes.append(
            f"{count(joined, 'object')} did not fit into a tile with its overlap of {overlap} px and "
            f"{'was' if joined == 1 else 'were'} joined from parts; larger tiles or a larger overlap find them whole"
        )
    det = ArrayDetections((height, width), boxes, scores, labels)
    return Found(det, crops if len(crops) == len(kept) else None, best, notes)


def _pieces(det: ArrayDetections, tile: int, window: Window, size: tuple[int, int]) -> Iterator[_Piece]:
    """The detections of one tile, moved to their place in the image of (width, height) ``size``."""
    low, high = np.array(window[:2]), np.array(window[2:])
    reach = max(2.0, _CUT * max(high - low))
    boxes = det.boxes + np.array([*low, *low], np.float32)
    near_low = (low > 0) & (boxes[:, :2] < low + reach)
    cut = (near_low | ((high < size) & (boxes[:, 2:] > high - reach))).any(axis=1)
    # Copied, because the masks of the tile are as large as the tile.
    crops = [MaskCrop(c.top + window[1], c.left + window[0], c.bitmap.copy()) for c in crops_of(det) or ()]
    for piece in zip(boxes, det.scores.tolist(), det.classes.tolist(), crops or repeat(None), cut.tolist()):
        yield _Piece(tile, *piece)


def _join(pieces: list[_Piece], windows: list[Window]) -> tuple[list[_Piece], int]:
    """The objects behind the pieces, and how many were joined from cut parts alone."""
    of_tile: list[list[int]] = [[] for _ in windows]
    for i, piece in enumerate(pieces):
        of_tile[piece.tile].append(i)
    group = [[i] for i in range(len(pieces))]  # of each piece; pieces of one object share the list
    for a, b, shared in _overlaps(windows):
        for i, j in _matches(pieces, of_tile[a], of_tile[b], shared):
            one, other = group[i], group[j]
            if one is not other:
                one += other
                for k in other:
                    group[k] = one
    kept, joined = [], 0
    for members in {id(numbers): numbers for numbers in group}.values():
        parts = [pieces[i] for i in sorted(members)]
        whole = [p for p in parts if not p.cut]
        if whole:
            kept.append(max(whole, key=lambda p: p.score))
            continue
        union = _union(parts)
        if not _seen_whole(union, np.delete(np.array(windows), [p.tile for p in parts], axis=0)):
            kept.append(union)
            joined += len(parts) > 1
    return kept, joined


def _overlaps(windows: list[Window]) -> Iterator[tuple[int, int, Window]]:
    """Pairs of tiles and what they share."""
    corners = np.array(windows).reshape(-1, 4)
    for a, window in enumerate(corners):
        low, high = np.maximum(window[:2], corners[a + 1 :, :2]), np.minimum(window[2:], corners[a + 1 :, 2:])
        for k in np.flatnonzero((low < high).all(axis=1)).tolist():
            (x0, y0), (x1, y1) = low[k].tolist(), high[k].tolist()
            yield a, a + 1 + k, (x0, y0, x1, y1)


def _matches(pieces: list[_Piece], ours: list[int], theirs: list[int], shared: Window) -> list[tuple[int, int]]:
    """Pairs of one class that agree within ``shared``, the best first, each piece once."""
    sides = (np.array([pieces[i].box for i in numbers], np.float64).reshape(-1, 4) for numbers in (ours, theirs))
    inside = (np.hstack([np.maximum(b[:, :2], shared[:2]), np.minimum(b[:, 2:], shared[2:])]) for b in sides)
    iou = box_iou(*inside)
    found = []
    for r, c in np.argwhere(iou > _SAME / 2).tolist():
        one, other = pieces[ours[r]], pieces[theirs[c]]
        if one.label != other.label:
            continue
        overlap = float(iou[r, c])
        if one.crop is not None and other.crop is not None:
            mask, its = in_window(one.crop, shared), in_window(other.crop, shared)
            overlap = np.count_nonzero(mask & its) / max(int(np.count_nonzero(mask | its)), 1)
        if overlap >= _SAME:
            found.append((-overlap, ours[r], theirs[c]))
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for _, i, j in sorted(found):
        if i not in used and j not in used:
            pairs.append((i, j))
            used |= {i, j}
    return pairs


def _union(parts: list[_Piece]) -> _Piece:
    """One object of its parts, with the score of the largest."""
    if len(parts) == 1:
        return parts[0]
    boxes = np.array([p.box for p in parts])
    largest = max(parts, key=lambda p: float(np.prod(p.box[2:] - p.box[:2])))
    crops = [p.crop for p in parts if p.crop is not None and p.crop.bitmap.size]
    crop = largest.crop
    if crops:
        top, left = min(c.top for c in crops), min(c.left for c in crops)
        bottom = max(c.top + c.bitmap.shape[0] for c in crops)
        right = max(c.left + c.bitmap.shape[1] for c in crops)
        bitmap = np.zeros((bottom - top, right - left), dtype=bool)
        for c in crops:  # one part at a time: an object through a hundred tiles has a hundred
            bitmap[c.top - top :, c.left - left :][: c.bitmap.shape[0], : c.bitmap.shape[1]] |= c.bitmap
        crop = MaskCrop(top, left, bitmap)
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return _Piece(largest.tile, box, largest.score, largest.label, crop, True)


def _seen_whole(piece: _Piece, others: np.ndarray) -> bool:
    """Return whether the piece is well inside another tile, which would have found it."""
    reach = max(2.0, _CUT * float(np.max(others[:, 2:] - others[:, :2], initial=0)))
    inside = (others[:, :2] + reach <= piece.box[:2]) & (others[:, 2:] - reach >= piece.box[2:])
    return bool(inside.all(axis=1).any())
