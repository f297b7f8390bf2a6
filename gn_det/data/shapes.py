"""Generate the ``shapes`` set: five kinds of objects on textured backgrounds, in COCO format.

The quickstart and the tests use it, so it has the features of real data: objects of several sizes that occlude each
other, polygons and RLE, category ids with gaps, portrait and landscape images. Every image is a pure function of (seed,
split, number).
"""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from gn_det.data.annotations import decode_counts
from gn_det.data.catalog import GENERATED, DatasetSource, datasets_root
from gn_det.data.shapes_draw import CLASSES, Drawn, draw_scene
from gn_det.errors import DataError

#: Increase it when the drawing changes; sets of another version are regenerated.
VERSION = 3
#: Default number of images by split.
NUM_IMAGES = {"train": 600, "val": 100}
#: json category ids have gaps, as COCO's do, so that the mapping to contiguous indices is always exercised.
CATEGORY_IDS = (1, 2, 4, 7, 8)


def prepare(source: DatasetSource) -> None:
    """Generate ``source`` if it is a generated set and missing."""
    split = GENERATED.get(source.name)
    if split is not None and source.origin == "DETECTRON2_DATASETS":
        make_shapes(datasets_root() / "shapes", split)


def make_shapes(
    root: str | os.PathLike[str], split: str, num_images: int | None = None, seed: int = 0
) -> DatasetSource:
    """Generate one split below ``root`` unless it already exists.

    Args:
        root: folder of the set; gets ``<split>/instances.json`` and ``<split>/images/``.
        split: any name; different splits have different images.
        num_images: default 600 for ``train``, 100 otherwise.
        seed: seed of the whole set.

    Raises:
        DataError: the folder cannot be written; no partial files are left.
    """
    root = Path(root)
    count = NUM_IMAGES.get(split, 100) if num_images is None else num_images
    stamp = {"description": "gn_det shapes", "version": VERSION, "split": split, "images": count, "seed": seed}
    place = root / split
    source = DatasetSource(f"shapes_{split}", str(place / "instances.json"), str(place / "images"), "shapes")
    if _stamp_of(place) == stamp:
        return source
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{split}-", dir=root, ignore_cleanup_errors=True) as folder:
            building = Path(folder) / "new"
            _write_split(building, split, count, seed, stamp)
            _put_in_place(building, place, stamp)
    except OSError as error:
        raise DataError(
            f"{root}: the shapes set cannot be written ({error.strerror or error}): free space or fix the permissions, "
            f"or set DETECTRON2_DATASETS to a writable folder"
        ) from error
    return source


def _stamp_of(place: Path) -> Any:
    try:
        return json.loads((place / "stamp.json").read_text())
    except (OSError, ValueError):
        return None


def _put_in_place(building: Path, place: Path, stamp: dict[str, Any]) -> None:
    """Move the finished folder into place, or keep the same set if another process was faster."""
    try:
        if _stamp_of(place) != stamp:
            if place.exists():
                place.rename(building.with_name("old"))
            building.rename(place)
    except OSError:
        if _stamp_of(place) != stamp:
            raise


def _write_split(folder: Path, split: str, count: int, seed: int, stamp: dict[str, Any]) -> None:
    (folder / "images").mkdir(parents=True)
    split_number = int.from_bytes(split.encode(), "big") % (2**63)

    def one(number: int) -> tuple[dict[str, Any], list[Drawn]]:
        rng = np.random.default_rng([seed, split_number, number])
        pixels, objects = draw_scene(rng)
        name = f"{number + 1:06d}.jpg"
        Image.fromarray(pixels).save(folder / "images" / name, quality=92)
        height, width = pixels.shape[:2]
        return {"id": number + 1, "file_name": name, "height": height, "width": width}, objects

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        scenes = list(pool.map(one, range(count)))
    annotations: list[dict[str, Any]] = []
    for image, objects in scenes:
        annotations += [_annotation(len(annotations) + 1 + i, image["id"], o) for i, o in enumerate(objects)]
    content = {
        "info": stamp,
        "images": [image for image, _ in scenes],
        "annotations": annotations,
        "categories": [{"id": i, "name": n, "supercategory": "shape"} for i, n in zip(CATEGORY_IDS, CLASSES)],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "stamp.json").write_text(json.dumps(stamp))


def _annotation(number: int, image_id: int, drawn: Drawn) -> dict[str, Any]:
    """Write whole objects as polygons; rings and occluded objects as RLE, every other one compressed."""
    mask = coco_mask.encode(np.asfortranarray(drawn.visible, dtype=np.uint8))
    segmentation: Any = {"size": list(drawn.visible.shape), "counts": mask["counts"].decode()}
    if drawn.outline is not None:
        segmentation = [[round(float(v), 2) for v in drawn.outline.reshape(-1)]]
    elif number % 2 == 0:
        segmentation["counts"] = decode_counts(mask["counts"]).tolist()
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORY_IDS[drawn.category],
        "bbox": coco_mask.toBbox(mask).tolist(),
        "area": int(coco_mask.area(mask)),
        "iscrowd": 0,
        "segmentation": segmentation,
    }
