"""The annotations of a json: sound ones as numeric columns, the others one by one.

Nearly all annotations are sound. They are parsed in small chunks into typed values and checked with NumPy; only columns
and the text are kept. Any other annotation is parsed alone, and :mod:`gn_det.data.annotations` repairs it or reports
what is wrong.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Raw

#: Annotations parsed at once; small enough for the CPU cache.
_CHUNK = 256
#: Ids up to this one are exact in every json reader.
LARGEST_ID = 2**53

_Id = Annotated[int, Meta(ge=-LARGEST_ID, le=LARGEST_ID)]
_Positive = Annotated[float, Meta(gt=0, le=1e18)]


class _Object(msgspec.Struct):
    """Any json object, that is, an RLE, which is not read here."""


class _Sound(msgspec.Struct, gc=False):
    id: Annotated[int, Meta(gt=0, le=LARGEST_ID)]
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, _Positive, _Positive]
    area: _Positive
    iscrowd: Literal[0, 1]
    segmentation: list[Annotated[list[float], Meta(min_length=6)]] | _Object | None = None
    ignore: Any = None


_ONE, _MANY = msgspec.json.Decoder(_Sound), msgspec.json.Decoder(list[_Sound])
_BETWEEN = re.compile(rb"[\s,]*")
_FIELDS = attrgetter("id", "image_id", "category_id", "bbox", "iscrowd", "segmentation", "ignore")


def _integer(digits: str) -> float:
    """An integer of any length: Python refuses those of more than 4300 digits, which are beyond every limit."""
    return int(digits) if len(digits) < 1000 else float(digits)


class Entries(Sequence[Any]):
    """Sequence in which ``entries[position]`` is the parsed annotation at that position of the json.

    Args:
        entries: a parsed list, or pieces of ``text``.
        text: text of the file.

    Attributes:
        text: as given, and what :meth:`append` added.
        spans: (N, 2) int64 start and end of each entry in ``text``.
        sound: (N,) bool; the arrays below hold values where it is True.
        id, image_id, category_id: (N,) int64.
        crowd: (N,) bool.
        bbox: (N, 4) float64 XYWH, with positive sides.
        hull: (N, 4) float64 XYXY box of the polygons, NaN without polygons. Each polygon has an even number of
            coordinates, at least 6, and at least one polygon is thicker than a pixel.
    """

    def __init__(self, entries: list[Any], text: bytearray | None = None) -> None:
        count = len(entries)
        self.text = bytearray() if text is None else text
        self._parsed = entries if text is None else None
        self.sound, self.crowd = np.zeros((2, count), bool)
        self.id, self.image_id, self.category_id = np.zeros((3, count), np.int64)
        self.bbox, self.hull = np.zeros((count, 4)), np.full((count, 4), np.nan)
        self.spans = np.zeros((count, 2), np.int64) if text is None else _spans(entries, text)
        for start in range(0, 0 if text is None else count, _CHUNK):
            self._read(start, self.spans[start : start + _CHUNK].tolist())

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, position: Any) -> Any:
        if self._parsed is not None:
            return self._parsed[position]
        return self.parse(*self.spans[position])

    def parse(self, start: int, end: int) -> Any:
        """Return the annotation between two places of the text."""
        return json.loads(self.text[start:end], parse_int=_integer)

    def append(self, text: bytes) -> tuple[int, int]:
        """Append the json of an annotation to the text, which no array may use yet; return its start and end."""
        self.text += text
        return len(self.text) - len(text), len(self.text)

    def _read(self, first: int, spans: list[list[int]]) -> None:
        """Fill the columns of one chunk."""
        at = np.arange(first, first + len(spans))
        try:
            found = _MANY.decode(b"[" + self.text[spans[0][0] : spans[-1][1]] + b"]")
        except msgspec.DecodeError:
            tried = [_sound(self.text[start:end]) for start, end in spans]
            at = at[[entry is not None for entry in tried]]
            found = [entry for entry in tried if entry is not None]
        if not found:
            return
        number, image, category, boxes, crowd, masks, ignore = zip(*map(_FIELDS, found))
        self.id[at], self.image_id[at], self.category_id[at], self.crowd[at] = number, image, category, crowd
        self.bbox[at] = np.fromiter(chain.from_iterable(boxes), np.float64, 4 * len(at)).reshape(-1, 4)
        polygons = [type(mask) is list and len(mask) > 0 and not any(len(p) % 2 for p in mask) for mask in masks]
        self.sound[at] = [not skip and (polygon or not mask) for skip, polygon, mask in zip(ignore, polygons, masks)]
        rows = at[polygons]
        if len(rows):
            self.hull[rows], thick = _hulls([mask for mask, good in zip(masks, polygons) if good])
            self.sound[rows] &= thick


def _spans(entries: list[Raw], text: bytearray) -> np.ndarray:
    """Return start and end in ``text`` of ``entries``, the elements of one json array."""
    if not entries:
        return np.zeros((0, 2), np.int64)
    at = _address(entries[0]) - _address(text)
    spans = array("q")
    for length in (len(memoryview(entry)) for entry in entries):
        spans.extend((at, at + length))
        at = _BETWEEN.match(text, at + length).end()  # type: ignore[union-attr]
    return np.frombuffer(spans, np.int64).reshape(-1, 2)


def _address(data: Any) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def _sound(text: bytearray) -> _Sound | None:
    try:
        return _ONE.decode(text)
    except msgspec.DecodeError:
        return None


def _hulls(masks: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the XYXY box of each mask, and whether a polygon is thicker than a pixel (so it covers at least one)."""
    pieces = [piece for mask in masks for piece in mask]
    numbers = array("d")
    for piece in pieces:
        numbers.fromlist(piece)
    points = np.frombuffer(numbers, np.float64).reshape(-1, 2)
    starts = _starts([len(piece) // 2 for piece in pieces])
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    following = np.roll(points, -1, axis=0)
    following[np.append(starts[1:], len(points)) - 1] = points[starts]
    with np.errstate(over="ignore", invalid="ignore"):
        cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
        # above 2, so that rounding cannot matter
        thick = np.abs(np.add.reduceat(cross, starts)) > 2.001 * (high - low).sum(axis=1)
    firsts = _starts([len(mask) for mask in masks])
    hulls = np.hstack([np.minimum.reduceat(low, firsts), np.maximum.reduceat(high, firsts)])
    return hulls, np.logical_or.reduceat(thick, firsts)


def _starts(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths[:-1]])
