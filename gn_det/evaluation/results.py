"""Convert :class:`Detections` to COCO's result format and file, and format metrics as Detectron2's tables."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from tabulate import tabulate

from gn_det.errors import DataError
from gn_det.files import StrPath, atomic_write, json_bytes
from gn_det.structures import AnyDetections, crop_mask, encode_crop, to_numpy
from gn_det.text import one_line

if TYPE_CHECKING:
    from torch import Tensor

#: Name of the results file, as Detectron2 writes it.
RESULTS_FILE = "coco_instances_results.json"
#: Entries that are written at once.
_PART = 10_000
#: Metrics of one task, in Detectron2's order.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True, eq=False)
class ImageResults(Sequence[dict[str, Any]]):
    """COCO results of one image with N detections; the entries are made when they are read."""

    image_id: Any
    categories: list[int]  # category id of each detection
    boxes: np.ndarray  # (N, 4) float32, XYWH
    scores: np.ndarray  # (N,) float64
    size: tuple[int, int]  # height and width of the masks
    runs: str | None  # the compressed RLE of all masks, one after the other; None without masks
    ends: np.ndarray  # (N + 1,) where they begin and end

    @classmethod
    def of(cls, image_id: Any, det: AnyDetections, category_ids: Sequence[int]) -> ImageResults:
        """Take over ``det``; arguments and errors as of :func:`detections_to_coco`."""
        classes = det.classes.tolist()
        if classes and (max(classes) >= len(category_ids) or min(classes) < 0):
            raise DataError(
                f"image {image_id!r}: the model predicts class index {max(classes)} but the data set has "
                f"{len(category_ids)} categories; set MODEL.ROI_HEADS.NUM_CLASSES {len(category_ids)} or use its own "
                "json"
            )
        boxes = np.array(to_numpy(det.boxes), dtype=np.float32)
        boxes[:, 2:] -= boxes[:, :2]
        categories, scores = [int(category_ids[c]) for c in classes], np.array(det.scores.tolist(), np.float64)
        masks = [] if det.masks is None else encode_masks(det.masks)
        return cls.pack(image_id, categories, boxes, scores, None if det.masks is None else masks)

    @classmethod
    def pack(
        cls,
        image_id: Any,
        categories: list[int],
        boxes: np.ndarray,
        scores: np.ndarray,
        masks: Sequence[Mapping[str, Any]] | None,
    ) -> ImageResults:
        """Return the results with ``masks`` as compressed RLE of one size."""
        counts = [mask["counts"] for mask in masks or ()]
        height, width = masks[0]["size"] if masks else (0, 0)
        ends = np.cumsum([0, *map(len, counts)], dtype=np.int32)
        runs = None if masks is None else "".join(counts)
        return cls(image_id, categories, boxes, scores, (height, width), runs, ends)

    def __len__(self) -> int:
        return len(self.categories)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        entry = {
            "image_id": self.image_id,
            "category_id": self.categories[index],
            "bbox": self.boxes[index].tolist(),
            "score": self.scores[index].item(),
        }
        if self.runs is not None:
            k = range(len(self))[index]
            entry["segmentation"] = {"size": list(self.size), "counts": self.runs[self.ends[k] : self.ends[k + 1]]}
        return entry


class CocoResults(Sequence[dict[str, Any]]):
    """COCO results of a data set, image by image; the entries are made when they are read.

    Arrays need about a tenth of the memory of entries, which take 320 MB for 250,000 detections with masks.
    """

    def __init__(self, images: Iterable[ImageResults] = ()) -> None:
        """Keep the results of ``images``, of an image that occurs again (padding of the last batch) only the first."""
        self.images: list[ImageResults] = []
        self._ids: set[Any] = set()
        self._ends: list[int] = []  # number of entries up to the end of each image
        for image in images:
            self.append(image)

    def append(self, image: ImageResults) -> None:
        """Append the results of an image; nothing if it is there already."""
        if image.image_id not in self._ids:
            self._ids.add(image.image_id)
            self._ends.append(len(self) + len(image))
            self.images.append(image)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(self.images)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = bisect_right(self._ends, place)
        return self.images[number][place - self._ends[number]]  # counted from the end of the image


def detections_to_coco(image_id: Any, det: AnyDetections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return one result entry per detection.

    Args:
        image_id: id of the image in the COCO json.
        det: detections at the size of the original image.
        category_ids: json category id of each contiguous class index.

    Returns:
        ``{"image_id", "category_id", "bbox": XYWH, "score"}`` and, with masks, ``"segmentation"``: compressed RLE with
        counts as text.

    Raises:
        DataError: a class index has no category id.
    """
    return list(ImageResults.of(image_id, det, category_ids))


def encode_masks(masks: Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Encode (N, H, W) masks of any dtype (nonzero is inside) as compressed RLE: ``{"size": [H, W], "counts": text}``.

    The text equals that of pycocotools' encoder. Most of the work is the conversion to column order, which is limited
    to the bounding box of a mask.
    """
    bitmaps = (to_numpy(mask).astype(bool, copy=False) for mask in masks)
    return [encode_crop(crop_mask(bitmap), *bitmap.shape) for bitmap in bitmaps]


def write_results(results: Sequence[dict[str, Any]], output_dir: StrPath) -> str:
    """Write ``coco_instances_results.json`` atomically and return its path.

    Raises:
        WriteError: the folder cannot be written (no permission, disk full); an existing file is kept.
    """
    path = os.path.join(os.fspath(output_dir), RESULTS_FILE)
    parts = (json_bytes(results[k : k + _PART])[1:-1] for k in range(0, len(results), _PART))
    atomic_write(path, b"[" + b", ".join(parts) + b"]")
    return path


def format_results(results: Mapping[str, Mapping[str, float]]) -> str:
    """Format a summary and a per-category table per task, then three ``copypaste:`` lines, like Detectron2."""
    blocks, lines = [], []
    for task, metrics in results.items():
        overall = {k: v for k, v in metrics.items() if "-" not in k}
        look = {"tablefmt": "pipe", "floatfmt": ".3f"}
        table = tabulate([list(overall.values())], list(overall), **look, stralign="center", numalign="center")
        blocks.append(f"Evaluation results for {task}:\n{table}")
        categories = [(one_line(k.removeprefix("AP-")), v) for k, v in metrics.items() if k.startswith("AP-")]
        if categories:
            columns = min(6, 2 * len(categories))  # up to three pairs a row
            flat = list(itertools.chain.from_iterable(categories))
            rows = itertools.zip_longest(*[flat[i::columns] for i in range(columns)])
            table = tabulate(rows, ["category", "AP"] * (columns // 2), **look, numalign="left")
            blocks.append(f"Per-category {task} AP:\n{table}")
        values = ",".join(f"{v:.4f}" for v in overall.values())
        lines += [f"copypaste: {line}" for line in (f"Task: {task}", ",".join(overall), values)]
    return "\n".join([*blocks, *lines])
