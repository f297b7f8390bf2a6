"""Exported folders are recognized by their names and by where their images are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gn_det.data.layouts import find_layout
from gn_det.errors import DataError


def _json(path: Path, file_name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": [{"id": 1, "file_name": file_name, "width": 4, "height": 4}], "annotations": []}
    path.write_text(json.dumps(content))


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


LAYOUTS = {
    "roboflow": (
        {"train/_annotations.coco.json": "a.jpg", "valid/_annotations.coco.json": "b.jpg",
         "test/_annotations.coco.json": "c.jpg"},
        ["train/a.jpg", "valid/b.jpg", "test/c.jpg"],
        ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
    ),
    "cvat": (
        {"annotations/instances_default.json": "a.jpg"}, ["images/default/a.jpg"],
        ("annotations/instances_default.json", "images/default", None, None),
    ),
    "cvat with splits": (
        {"annotations/instances_Train.json": "a.jpg", "annotations/instances_Validation.json": "b.jpg"},
        ["images/Train/a.jpg", "images/Validation/b.jpg"],
        ("annotations/instances_Train.json", "images/Train", "annotations/instances_Validation.json",
         "images/Validation"),
    ),
    "label studio": (
        {"result.json": "images\\a.jpg"}, ["images/a.jpg"], ("result.json", ".", None, None),
    ),
    "coco": (
        {"annotations/instances_train2017.json": "a.jpg", "annotations/instances_val2017.json": "b.jpg",
         "annotations/captions_train2017.json": "a.jpg"},
        ["train2017/a.jpg", "val2017/b.jpg"],
        ("annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017"),
    ),
    "one folder": (
        {"train.json": "a.jpg", "val.json": "b.jpg"}, ["images/a.jpg", "images/b.jpg"],
        ("train.json", "images", "val.json", "images"),
    ),
    "train and test": (
        {"train/x.json": "a.jpg", "test/x.json": "b.jpg"}, ["train/a.jpg", "test/b.jpg"],
        ("train/x.json", "train", "test/x.json", "test"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    jsons, images, wanted = LAYOUTS[name]
    for path, file_name in jsons.items():
        _json(tmp_path / path, file_name)
    for image in images:
        _image(tmp_path / image)
    (tmp_path / "notes.json").write_text('{"x": 1}')  # no annotations
    keys = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    want = {f"DATASETS.{key}": str(tmp_path / value) for key, value in zip(keys, wanted) if value is not None}
    assert find_layout(tmp_path) == want


def test_what_cannot_be_recognized_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        find_layout(tmp_path / "none")
    with pytest.raises(DataError, match="no COCO json for training"):
        find_layout(tmp_path)
    _json(tmp_path / "a.json", "x.jpg")
    with pytest.raises(DataError, match=r"first image 'x.jpg' is in none of"):
        find_layout(tmp_path)
    _json(tmp_path / "b.json", "x.jpg")
    with pytest.raises(DataError, match=r"both a\.json and b\.json may be the only annotations; name one with"):
        find_layout(tmp_path)
