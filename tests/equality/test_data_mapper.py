"""The same record and the same random numbers give the same sample in Detectron2's mapper and in ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2.config", reason="compares with an installed Detectron2")

from gn_det import config_file
from gn_det.config import get_cfg, load_config
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.image import ImageReader
from gn_det.data.mapper import InferenceMapper, TrainMapper
from tests.equality.table import SHIPPED
from tests.golden.d2_side import registered_cfg

pytestmark = pytest.mark.detectron2


def _make_dataset(folder: Path, *, kind: str, whole_numbers: bool = False) -> DatasetSource:
    """Ten images of odd sizes; ``kind`` is polygon, rle or mixed per object; one crowd an image."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(5)
    images, annotations = [], []
    for number in range(1, 11):
        width, height = int(rng.integers(41, 97)), int(rng.integers(37, 99))
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for k in range(5):
            center = rng.uniform(8, [width - 8, height - 8])
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 12))))
            points = center + rng.uniform(4, 22) * np.stack([np.cos(angles), np.sin(angles)], 1)
            digits = 0 if whole_numbers else 2
            points = points.round(digits)
            pieces = [points.reshape(-1).tolist(), (points / 2 + 3).round(digits).reshape(-1).tolist()]
            if whole_numbers:
                pieces = [[int(v) for v in p] for p in pieces]
            low = np.clip(points.min(0), 0, None)
            size = np.maximum(points.max(0) - low, 1)
            rle = coco_mask.merge(coco_mask.frPyObjects(pieces, height, width))
            if kind == "polygon":
                segmentation = pieces
            else:
                segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
            bbox = [round(float(v), 2) for v in (*low, *size)]
            bbox = [int(v) for v in bbox] if whole_numbers else bbox
            crowd = int(k == 4)
            if crowd:
                segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(rng.choice([3, 7, 9])),
                    "bbox": bbox,
                    "area": float(size.prod()),
                    "iscrowd": crowd,
                    "segmentation": segmentation,
                }
            )
    categories = [{"id": i, "name": f"c{i}"} for i in (9, 3, 7)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    return DatasetSource("own", str(folder / "a.json"), str(folder))


def _cfgs(mask_format: str, *, crop: bool, flip: str, sampling: str):
    from detectron2.config import get_cfg as get_d2_cfg

    out = []
    for make in (get_cfg, get_d2_cfg):
        cfg = make()
        cfg.INPUT.MIN_SIZE_TRAIN = (50, 61, 83) if sampling == "choice" else (50, 83)
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = sampling
        cfg.INPUT.MAX_SIZE_TRAIN = 101
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 101
        cfg.INPUT.MASK_FORMAT = mask_format
        cfg.INPUT.RANDOM_FLIP = flip
        cfg.INPUT.CROP.ENABLED = crop
        cfg.INPUT.CROP.SIZE = [0.4, 0.4]
        cfg.MODEL.MASK_ON = True
        out.append(cfg)
    return out


def _d2_records(data: CocoDataset) -> list[dict]:
    """The dataset through Detectron2's own loader."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets.coco import load_coco_json

    name = f"gn_det_test_{id(data)}"
    records = load_coco_json(data.json_file, data.image_root, name)
    meta = MetadataCatalog.get(name)
    assert tuple(meta.thing_classes) == data.class_names
    assert meta.thing_dataset_id_to_contiguous_id == {c: i for i, c in enumerate(data.category_ids)}
    MetadataCatalog.pop(name)
    DatasetCatalog.pop(name, None)
    return records


@pytest.mark.parametrize(
    ("kind", "mask_format", "crop", "flip", "sampling", "whole"),
    [
        ("polygon", "polygon", False, "horizontal", "choice", False),
        ("polygon", "polygon", False, "vertical", "range", False),
        ("polygon", "bitmask", False, "horizontal", "choice", False),
        ("rle", "bitmask", False, "horizontal", "choice", False),
        ("rle", "bitmask", True, "horizontal", "choice", False),
        # integer json: Detectron2 truncates after scaling
        ("polygon", "polygon", False, "horizontal", "choice", True),
        ("polygon", "bitmask", False, "none", "choice", True),
    ],
)
def test_train_samples_are_equal(
    tmp_path: Path, kind: str, mask_format: str, crop: bool, flip: str, sampling: str, whole: bool
) -> None:
    data = load_coco(_make_dataset(tmp_path, kind=kind, whole_numbers=whole), max_bad=0)
    cfg, d2_cfg = _cfgs(mask_format, crop=crop, flip=flip, sampling=sampling)
    _assert_same_training_samples(cfg, d2_cfg, data)


def _assert_same_training_samples(
    cfg: Any, d2_cfg: Any, data: CocoDataset, images: int = 10, theirs: Any = None, first_seed: int = 0
) -> None:
    from detectron2.data import DatasetMapper

    ours, theirs = TrainMapper(cfg), theirs or DatasetMapper(d2_cfg, is_train=True)
    d2_records = _d2_records(data)
    assert [r["file_name"] for r in d2_records] == [r["file_name"] for r in data.records]
    for seed, (record, d2_record) in enumerate(zip(list(data.records)[:images], d2_records), first_seed):
        np.random.seed(seed)
        want = theirs(copy.deepcopy(d2_record))
        got = ours(record, np.random.RandomState(seed))
        assert got["image"].dtype == want["image"].dtype == torch.uint8
        assert torch.equal(got["image"], want["image"])
        assert (got["height"], got["width"], got["image_id"]) == (want["height"], want["width"], want["image_id"])
        instances, targets = want["instances"], got["targets"]
        assert targets.image_size == instances.image_size
        assert torch.equal(targets.classes, instances.gt_classes)
        assert torch.equal(targets.boxes, instances.gt_boxes.tensor)
        boxes = targets.boxes + torch.tensor([-1.3, 0.7, 2.1, 1.9])
        assert torch.equal(targets.masks.crop_and_resize(boxes, 28), instances.gt_masks.crop_and_resize(boxes, 28))


@pytest.mark.parametrize("case", SHIPPED)
def test_train_samples_of_the_shipped_configs(
    case: str, tmp_path: Path, measured: Callable[[str, str, str, float], None]
) -> None:
    """At the configs' own sizes; Detectron2 reads the YAML with gn_det's keys and without."""
    data = load_coco(_make_dataset(tmp_path, kind="polygon"), max_bad=0)
    for side in ("own", "registered"):
        cfg = registered_cfg()
        cfg.merge_from_file(config_file(SHIPPED[case]))
        if side == "own":
            del cfg.MODEL["GN"]
        measured(case, "mapper", side, 0.0)  # anything else fails
        _assert_same_training_samples(load_config(SHIPPED[case]), cfg, data, images=2)


def test_cropped_polygons_are_equal(tmp_path: Path) -> None:
    pytest.importorskip("shapely", reason="polygons are cropped by shapely in both")
    test_train_samples_are_equal(tmp_path, "polygon", "polygon", True, "horizontal", "choice", False)


@pytest.mark.parametrize(("kind", "mask_format"), [("polygon", "polygon"), ("polygon", "bitmask"), ("rle", "bitmask")])
def test_large_scale_jitter_is_equal(tmp_path: Path, kind: str, mask_format: str) -> None:
    """ResizeScale, FixedSizeCrop and RandomFlip of Detectron2's new baselines: pixels, boxes, masks.

    Detectron2's default fills the padding of bitmaps with 255, which its masks take for object; 0 is meant.
    """
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T

    data = load_coco(_make_dataset(tmp_path, kind=kind), max_bad=0)
    cfg, d2_cfg = _cfgs(mask_format, crop=False, flip="horizontal", sampling="choice")
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 96
    jitter = [
        T.ResizeScale(0.1, 2.0, 96, 96),
        T.FixedSizeCrop((96, 96), seg_pad_value=0),
        T.RandomFlip(horizontal=True),
    ]
    theirs = DatasetMapper(d2_cfg, is_train=True, augmentations=jitter, recompute_boxes=True)
    for round_ in range(3):
        _assert_same_training_samples(cfg, d2_cfg, data, theirs=theirs, first_seed=100 * round_)


def test_test_samples_are_equal(tmp_path: Path) -> None:
    from detectron2.data import DatasetMapper

    data = load_coco(_make_dataset(tmp_path, kind="polygon"), max_bad=0)
    cfg, d2_cfg = _cfgs("polygon", crop=False, flip="none", sampling="choice")
    ours, theirs = InferenceMapper(cfg), DatasetMapper(d2_cfg, is_train=False)
    for record, d2_record in zip(data.records, _d2_records(data)):
        want, got = theirs(d2_record), ours(record)
        assert torch.equal(got["image"], want["image"])
        assert {k: got[k] for k in ("height", "width", "image_id", "file_name")} == {
            k: want[k] for k in ("height", "width", "image_id", "file_name")
        }


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
def test_every_8_bit_image_mode_is_read_alike(tmp_path: Path, image_format: str) -> None:
    from detectron2.data.detection_utils import read_image as d2_read_image

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    pictures = {f"{mode}.png": rgb.convert(mode) for mode in ("1", "L", "P", "LA", "RGBA", "RGB")}
    pictures["cmyk.jpg"] = rgb.convert("CMYK")
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        rgb.save(tmp_path / f"exif{orientation}.jpg", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        want, got = d2_read_image(str(path), image_format), ImageReader(image_format).read(path)
        assert got.dtype == want.dtype, path.name
        assert np.array_equal(got, want), path.name
