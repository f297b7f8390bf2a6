"""gn_det's datasets in Detectron2's catalogs: generated shapes, the user's COCO data, and ``json@images`` names.

They are read by gn_det's reader, with the same checks, repairs and messages as in the embedded engine.
"""

# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.file_io import PathHandler, PathManager
from pycocotools import mask as coco_mask

from gn_det.config.defaults import edited
from gn_det.data.catalog import BUILTIN, GENERATED, DatasetSource, resolve
from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.image import ImageReader
from gn_det.data.shapes import CATEGORY_IDS
from gn_det.data.shapes_draw import CLASSES
from gn_det.engine import dist
from gn_det.errors import ConfigError, DataError
from gn_det.files import atomic_write
from gn_det.text import one_line, shown

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

#: Names of test and training set in the keys of files and of catalogs; a set that is both is a training set.
_SPLITS = (("VAL", "TEST"), ("TRAIN", "TRAIN"))


class _Source:
    """Function that the catalog calls for the records of one dataset.

    ``max_bad``, ``polygons_only`` (the mapper would refuse RLE) and ``reader`` come from the last config that names the
    set. With INPUT.BIT_DEPTH, Detectron2 reads images through :class:`EightBits`.
    """

    def __init__(self, name: str, source: DatasetSource) -> None:
        self.name, self.source = name, source
        self.max_bad, self.polygons_only, self.reader = 0, False, ImageReader()

    def __call__(self) -> list[dict[str, Any]]:
        dataset = _load(self.source, self.max_bad, self.reader)
        _describe(self.name, dataset.class_names, dataset.category_ids)
        records = [_record(record) for record in dataset.records]
        # Detectron2 drops crowds before it checks masks.
        masks = (a for r in records for a in r["annotations"] if isinstance(a.get("segmentation"), dict))
        if self.polygons_only and (rle := next((a["id"] for a in masks if not a["iscrowd"]), None)) is not None:
            raise DataError(
                f"{self.source.json_file}: annotation {rle} has an RLE mask, which Detectron2's mapper takes only as a "
                "bitmap: set INPUT.MASK_FORMAT bitmask"
            )
        for record in records if self.reader.bit_depth else ():
            record["file_name"] = EightBits.name(record["file_name"], self.reader)
        return records


class EightBits(PathHandler):
    """Opens ``gn_det-8bit://DEPTH/MAX_PIXELS/PATH``: the image PATH, scaled to 8 bits by INPUT.BIT_DEPTH.

    Detectron2's mapper and tools open images by name, and clip values of more than 8 bits.
    """

    PREFIX = "gn_det-8bit://"

    @classmethod
    def name(cls, path: str, reader: ImageReader) -> str:
        """Return the name with which Detectron2 opens ``path`` like ``reader``."""
        return f"{cls.PREFIX}{reader.bit_depth}/{reader.max_pixels}/{os.path.abspath(path)}"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> BinaryIO:
        depth, limit, file = path.removeprefix(self.PREFIX).split("/", 2)
        pixels = ImageReader("RGB", depth, int(limit)).read(file)
        return io.BytesIO(b"P6 %d %d 255\n" % pixels.shape[1::-1] + pixels.tobytes())  # PPM has no compression


def register_shapes() -> None:
    """Register ``shapes_train`` and ``shapes_val``; they are generated when first read."""
    for name in GENERATED:
        enter(name, resolve(name))
        _describe(name, CLASSES, CATEGORY_IDS)


def register_sets(cfg: CfgNode) -> None:
    """Register DATASETS.TRAIN_JSON and VAL_JSON, which replace DATASETS.TRAIN and TEST, else ``json@images`` names."""
    for split, key in _SPLITS:
        json_file, images = (os.path.expanduser(cfg.DATASETS[f"{split}_{part}"]) for part in ("JSON", "IMAGES"))
        if images and not json_file:
            raise ConfigError(f"DATASETS.{split}_IMAGES is set without DATASETS.{split}_JSON: give the json, too")
        sources = {name: resolve(name, f"DATASETS.{key}") for name in cfg.DATASETS[key] if ".json@" in name}
        if json_file:
            images = images or os.path.dirname(json_file) or "."
            origin = f"DATASETS.{split}_JSON and {split}_IMAGES"
            cfg.DATASETS[key] = (f"{json_file}@{images}",)
            sources = {cfg.DATASETS[key][0]: DatasetSource(os.path.basename(json_file), json_file, images, origin)}
        for name, source in sources.items():
            enter(name, source)
            entry = DatasetCatalog[name]
            if isinstance(entry, _Source):  # otherwise the user registered this name with another reader
                entry.max_bad = cfg.DATALOADER.MAX_BAD
                # Detectron2 also reads 8-bit images in INPUT.FORMATs that the reader does not support.
                entry.reader = ImageReader.of(cfg, "RGB")
                entry.polygons_only = key == "TRAIN" and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"


def is_own(name: str) -> bool:
    """Return whether gn_det reads the set of that name; False for sets of Detectron2 and of the user."""
    return name in DatasetCatalog and isinstance(DatasetCatalog[name], _Source)


def take_mixed_masks(cfg: CfgNode) -> None:
    """Set INPUT.MASK_FORMAT bitmask for the shapes, which mix polygons and RLE."""
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon" and any(n in GENERATED for n in cfg.DATASETS.TRAIN):
        logger.info("INPUT.MASK_FORMAT: bitmask, because the shapes have polygons and RLE.")
        cfg.INPUT.MASK_FORMAT = "bitmask"


def name_by_files(cfg: CfgNode) -> CfgNode:
    """Return a copy of ``cfg`` in which sets known only to Detectron2's catalog are named ``json@images``.

    Sets registered by ``register_coco_instances`` have their files in the metadata. The result of a registered function
    is written as COCO json to OUTPUT_DIR, or refused. All processes of the group must call this.
    """
    out = edited(cfg)
    for split, key in _SPLITS:
        if not cfg.DATASETS[f"{split}_JSON"]:
            out.DATASETS[key] = tuple(_by_files(name, cfg.OUTPUT_DIR) for name in cfg.DATASETS[key])
    return out


def _by_files(name: str, folder: str) -> str:
    if name in BUILTIN or ".json@" in name or name not in DatasetCatalog:
        return name
    metadata = MetadataCatalog.get(name)
    json_file, images = metadata.get("json_file"), metadata.get("image_root")
    in_coco_format = metadata.get("evaluator_type", "coco") == "coco"  # LVIS has a different json format
    if json_file and str(json_file).endswith(".json") and images is not None and in_coco_format:
        return f"{json_file}@{images}"
    return dist.on_first_rank(lambda: _write_json(name, folder))


def _write_json(name: str, folder: str) -> str:
    """Write the result of the function registered as ``name`` as COCO json; return its ``json@images`` name."""
    try:
        records = DatasetCatalog.get(name)
    except OSError as error:
        raise DataError(
            f"dataset {name!r}: its registered function cannot read its files: {one_line(error)}"
        ) from error
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise ConfigError(
            f"the metadata of dataset {name!r} has no thing_classes: set them by "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...])"
        )
    data = to_coco(name, records, classes)
    files = [os.path.dirname(image["file_name"]) for image in data["images"]]
    root = os.path.commonpath(files) if files else os.getcwd()
    for image in data["images"]:
        image["file_name"] = os.path.relpath(image["file_name"], root)
    path = Path(folder).expanduser().absolute() / "datasets" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json"
    atomic_write(path, json.dumps(data))
    logger.info("%s: the %d records of the registered function are written to %s.", name, len(records), path)
    return f"{path}@{root}"


def to_coco(name: str, records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Convert records of Detectron2's format to COCO; DataError names a wrong record or annotation."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for position, record in enumerate(records):
        where = f"dataset {name!r}, record {position}"
        try:
            number = record.get("image_id", position)
            number = number if isinstance(number, str) else int(number)
            image = {"id": number, "file_name": os.path.abspath(record["file_name"])}
            images.append({**image, "height": int(record["height"]), "width": int(record["width"])})
            for index, annotation in enumerate(record.get("annotations", ())):
                where = f"dataset {name!r}, record {position} ({shown(str(record['file_name']))}), annotation {index}"
                entry = _to_coco(annotation)
                annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else one_line(str(error))
            raise DataError(f"{where}: {what}; see Detectron2's standard dataset format") from None
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": str(class_name)} for i, class_name in enumerate(classes)],
    }


def _to_coco(annotation: Mapping[str, Any]) -> dict[str, Any]:
    mode = BoxMode(annotation["bbox_mode"])
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"bbox_mode {mode.name}: use XYXY_ABS or XYWH_ABS")
    bbox = BoxMode.convert([float(v) for v in annotation["bbox"]], mode, BoxMode.XYWH_ABS)
    entry = {
        "bbox": bbox,
        "category_id": int(annotation["category_id"]),
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "area": bbox[2] * bbox[3],
    }
    mask = annotation.get("segmentation")
    if isinstance(mask, Mapping):
        counts = mask["counts"]
        counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
        if isinstance(counts, str):
            entry["area"] = float(coco_mask.area({"size": list(mask["size"]), "counts": counts}))
        else:
            counts = [int(v) for v in counts]
            entry["area"] = float(sum(counts[1::2]))
        entry["segmentation"] = {"size": [int(v) for v in mask["size"]], "counts": counts}
    elif mask is not None:
        polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygon in mask]
        if all(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):  # the reader reports others
            entry["area"] = PolygonMasks([polygons]).area()[0].item()
        entry["segmentation"] = [p.tolist() for p in polygons]
    return entry


def enter(name: str, source: DatasetSource) -> None:
    """Add a set to Detectron2's catalogs, unless they have one of that name."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, _Source(name, source))
        MetadataCatalog.get(name).set(json_file=source.json_file, image_root=source.image_root, evaluator_type="coco")


@lru_cache(maxsize=8)
def _load(source: DatasetSource, max_bad: int, reader: ImageReader) -> CocoDataset:
    """Read once, because Detectron2 asks for the records for every loader it builds."""
    dataset = load_coco(source, max_bad=max_bad, need_annotations=False, reader=reader)
    logger.info(dataset.summary())
    return dataset


def _describe(name: str, class_names: Sequence[str], category_ids: Sequence[int]) -> None:
    contiguous = {category: index for index, category in enumerate(category_ids)}
    MetadataCatalog.get(name).set(thing_classes=list(class_names), thing_dataset_id_to_contiguous_id=contiguous)


def _record(record: Any) -> dict[str, Any]:
    for annotation in record["annotations"]:
        annotation["bbox_mode"] = BoxMode.XYWH_ABS
        if isinstance(annotation.get("segmentation"), list):
            annotation["segmentation"] = [polygon.tolist() for polygon in annotation["segmentation"]]
    return dict(record)


PathManager.register_handler(EightBits())
