"""A small valid COCO dataset on disk, for tests that then break it in one place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gn_det.data.catalog import DatasetSource

Change = Callable[[dict[str, Any]], object]


def _object(
    number: int, image: int, category: int, bbox: list[float], area: float, segmentation: Any, iscrowd: int = 0
) -> dict[str, Any]:
    ids = {"id": number, "image_id": image, "category_id": category}
    return {**ids, "bbox": bbox, "area": area, "iscrowd": iscrowd, "segmentation": segmentation}


#: 4 images of 40 x 30 (w x h); ids 5, 6, 7, 8; category ids with gaps, unsorted; image 8 is empty, 7 has only a crowd.
CONTENT: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"im {i}é.png", "width": 40, "height": 30} for i in (8, 6, 5, 7)],
    "categories": [{"id": 9, "name": "nine"}, {"id": 2, "name": "two"}],
    "annotations": [
        _object(11, 5, 9, [2.0, 3.0, 10.0, 8.0], 80.0, [[2.0, 3.0, 12.0, 3.0, 12.0, 11.0, 2.0, 11.0]]),
        _object(12, 5, 2, [20, 10, 5, 6], 30, {"size": [30, 40], "counts": [610, *[6, 24] * 4, 6, 464]}),
        _object(13, 6, 2, [0, 0, 4, 30], 120, {"size": [30, 40], "counts": ""}),
        _object(14, 7, 2, [0, 0, 1, 30], 30, {"size": [30, 40], "counts": [0, 30, 1170]}, iscrowd=1),
    ],
}


def write(folder: Path, *changes: Change) -> DatasetSource:
    """Write the dataset after applying ``changes`` to its json content."""
    content = copy.deepcopy(CONTENT)
    # The compressed string is made here so that its meaning stays visible: 4 full columns of 30 rows.
    from pycocotools import mask as coco_mask

    rle = coco_mask.frPyObjects({"size": [30, 40], "counts": [0, 120, 1080]}, 30, 40)
    content["annotations"][2]["segmentation"]["counts"] = rle["counts"].decode()
    for image in content["images"]:
        rng = np.random.default_rng(image["id"])
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / image["file_name"])
    for change in changes:
        change(content)
    (folder / "own.json").write_text(json.dumps(content))
    return DatasetSource("own", str(folder / "own.json"), str(folder), "DATASETS.TRAIN_JSON / TRAIN_IMAGES")
