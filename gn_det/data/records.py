"""Records of a dataset, kept as json text in one buffer shared by all processes.

A COCO-sized list of nested dicts costs gigabytes per worker, because touching a Python object copies its page. Here
annotations stay as checked json text. Forked workers read the same pages, spawned ones map the same shared memory, and
a record exists as Python objects only while it is used.
"""

from __future__ import annotations

import os
import pickle
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypedDict

import msgspec
import numpy as np

#: Polygons as flat arrays x0, y0, x1, y1 ... (float64; int64 if the json has only integers), or compressed RLE.
Segmentation: TypeAlias = "list[np.ndarray] | dict[str, Any]"
#: File name relative to the image folder, height, width and id of an image.
Head: TypeAlias = "tuple[str, int, int, Any]"


class Annotation(TypedDict, total=False):
    """One object. ``bbox`` is XYWH in absolute pixels, exactly as in the json; ``category_id`` is contiguous."""

    id: int
    bbox: list[float]
    category_id: int
    iscrowd: int
    area: float
    segmentation: Segmentation


class Record(TypedDict, total=False):
    """One image with its objects, like Detectron2's dataset dicts (bboxes in XYWH_ABS)."""

    file_name: str
    height: int
    width: int
    image_id: Any
    annotations: list[Annotation]


class Entry(msgspec.Struct, gc=False):
    """A checked annotation with its json values."""

    id: int
    category_id: int
    bbox: list[Any]
    area: Any
    iscrowd: int
    segmentation: Any = None


_ENTRIES = msgspec.json.Decoder(list[Entry])


class RecordList:
    """Read-only sequence of records; items are decoded on access and may be modified.

    Args:
        root: folder of the images.
        category_ids: json category id by contiguous index.
        heads: one for each image.
        bounds: start of each image's annotations in ``spans``, and the end of the last ones.
        text: json of checked annotations: usable polygon pieces only, RLE compressed.
        spans: (A, 2) int64 start and end of each annotation in ``text``.
    """

    def __init__(
        self,
        root: str,
        category_ids: Sequence[int],
        heads: Sequence[Head],
        bounds: np.ndarray,
        text: bytearray,
        spans: np.ndarray,
    ) -> None:
        import torch  # its tensors can be shared between processes; reading annotations alone does not need it

        self.root = root
        self._class_of = {category: i for i, category in enumerate(category_ids)}
        pickled, ends = bytearray(), array("q", [0])
        for head in heads:
            pickled += pickle.dumps(head)
            ends.append(len(pickled))
        self._head_ends = torch.frombuffer(ends, dtype=torch.int64)
        self._bounds, self._spans = torch.from_numpy(bounds), torch.from_numpy(spans)
        self._text, self._heads = (torch.frombuffer(d or bytearray(1), dtype=torch.uint8) for d in (text, pickled))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Record:
        (name, height, width, number), entries = self.entries(index)
        return Record(
            file_name=os.path.join(self.root, name),
            height=height,
            width=width,
            image_id=number,
            annotations=[self._annotation(entry) for entry in entries],
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def entries(self, index: int) -> tuple[Head, list[Entry]]:
        """Return one image and its annotations with their json values."""
        i = range(len(self))[index]
        text, heads = self._text.numpy().data, self._heads.numpy().data
        start, end = self._head_ends[i : i + 2].tolist()
        first, last = self._bounds[i : i + 2].tolist()
        found = (text[a:b] for a, b in self._spans[first:last].tolist())
        return pickle.loads(heads[start:end]), _ENTRIES.decode(b"[%b]" % b",".join(found))

    def _annotation(self, entry: Entry) -> Annotation:
        category, found = self._class_of[entry.category_id], entry.segmentation
        a = Annotation(id=entry.id, bbox=entry.bbox, category_id=category, iscrowd=entry.iscrowd, area=entry.area)
        if isinstance(found, dict):
            a["segmentation"] = {"size": found["size"], "counts": found["counts"].encode("ascii")}
        elif found:
            a["segmentation"] = [np.asarray(piece) for piece in found]
        return a
