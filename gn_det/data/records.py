"""Annotations kept compact in memory and shared between worker processes.

A COCO-sized list of nested dicts costs gigabytes per worker, because touching a Python object copies its page. Here
every record is pickled once into one flat byte tensor: forked workers read the same pages, spawned ones map the same
shared memory, and a record exists as objects only while it is used.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch

#: Polygons as flat arrays x0, y0, x1, y1 ... (float64; int64 where the json has only integers), or compressed RLE.
Segmentation: TypeAlias = "list[np.ndarray] | dict[str, Any]"


class Annotation(TypedDict, total=False):
    """One object. ``bbox`` is XYWH in absolute pixels exactly as in the json; ``category_id`` is contiguous."""

    id: int
    bbox: list[float]
    category_id: int
    iscrowd: int
    area: float
    segmentation: Segmentation


class Record(TypedDict, total=False):
    """One image with its objects, in the manner of Detectron2's dataset dicts (bboxes in XYWH_ABS)."""

    file_name: str
    height: int
    width: int
    image_id: Any
    annotations: list[Annotation]


class RecordList:
    """Read-only sequence of records over one byte buffer; items are decoded on access and free to be changed."""

    def __init__(self, records: Iterable[Record]) -> None:
        chunks = [pickle.dumps(_pack(record), protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        ends = np.cumsum([len(c) for c in chunks], dtype=np.int64)
        self._starts = torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), ends]))
        self._buffer = torch.from_numpy(np.frombuffer(b"".join(chunks) or b"\0", dtype=np.uint8).copy())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        i = range(len(self))[index]
        start, end = self._starts[i : i + 2].tolist()
        return _unpack(pickle.loads(self._buffer[start:end].numpy().data))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes that all records take together."""
        return self._buffer.numel() + 8 * self._starts.numel()


def _pack(record: Record) -> tuple[Any, ...]:
    """Tuples and raw bytes: field names and array headers would be repeated for every object."""
    objects = []
    for a in record["annotations"]:
        segmentation: Any = a.get("segmentation")
        if isinstance(segmentation, dict):
            segmentation = (*segmentation["size"], segmentation["counts"])
        elif segmentation is not None:
            segmentation = [(p.dtype.char, p.tobytes()) for p in segmentation]
        objects.append((a["id"], tuple(a["bbox"]), a["category_id"], a["iscrowd"], a["area"], segmentation))
    return record["file_name"], record["height"], record["width"], record["image_id"], objects


def _unpack(packed: tuple[Any, ...]) -> Record:
    file_name, height, width, image_id, objects = packed
    annotations: list[Annotation] = []
    for number, bbox, category, iscrowd, area, segmentation in objects:
        a = Annotation(id=number, bbox=list(bbox), category_id=category, iscrowd=iscrowd, area=area)
        if isinstance(segmentation, tuple):
            a["segmentation"] = {"size": [segmentation[0], segmentation[1]], "counts": segmentation[2]}
        elif segmentation is not None:
            a["segmentation"] = [np.frombuffer(raw, dtype=char).copy() for char, raw in segmentation]
        annotations.append(a)
    return Record(file_name=file_name, height=height, width=width, image_id=image_id, annotations=annotations)
