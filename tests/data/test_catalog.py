"""Names, pairs and keys lead to files; a mistyped name gets its nearest neighbor."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_det.config import get_cfg
from gn_det.data.catalog import datasets_for, resolve
from gn_det.data.shapes import prepare
from gn_det.errors import ConfigError


def test_builtin_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    source = resolve("coco_2017_val")
    assert (source.json_file, source.image_root) == (
        "datasets/coco/annotations/instances_val2017.json",
        "datasets/coco/val2017",
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert resolve("coco_2014_valminusminival").image_root == "/data/coco/val2014"


def test_pair() -> None:
    source = resolve("a@b/own.json@photos/of me@home")
    assert (source.json_file, source.image_root, source.name) == ("a@b/own.json", "photos/of me@home", "own")


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="unknown dataset 'coco_2017_vall'; did you mean 'coco_2017_val'"):
        resolve("coco_2017_vall")


def test_flags_take_the_place_of_names() -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train", "x.json@y")
    assert [s.name for s in datasets_for(cfg, "train")] == ["coco_2017_train", "x"]
    assert datasets_for(cfg, "test") == []
    cfg.DATASETS.TRAIN_JSON = "mine/train.json"
    (source,) = datasets_for(cfg, "train")
    assert (source.json_file, source.image_root) == ("mine/train.json", "mine")
    cfg.DATASETS.TRAIN_IMAGES = "pictures"
    assert datasets_for(cfg, "train")[0].image_root == "pictures"
    cfg.DATASETS.VAL_IMAGES = "pictures"
    with pytest.raises(ConfigError, match=r"VAL_IMAGES is set without DATASETS\.VAL_JSON"):
        datasets_for(cfg, "test")


def test_files_of_one_name_are_told_apart() -> None:
    """By as many folders as it takes, over both splits; metrics and result folders would collide otherwise."""
    cfg = get_cfg()
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = "d/train/instances.json", "d"
    cfg.DATASETS.TEST = ("d/val/instances.json@d", "e/val/instances.json@e", "f/other.json@f")
    assert [s.name for s in datasets_for(cfg, "train")] == ["train_instances"]
    assert [s.name for s in datasets_for(cfg, "test")] == ["d_val_instances", "e_val_instances", "other"]
    cfg.DATASETS.VAL_JSON, cfg.DATASETS.VAL_IMAGES = "d/train/instances.json", "d"  # the same file is the same set
    assert [s.name for s in datasets_for(cfg, "test")] == ["instances"]


def test_shapes_are_generated_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("gn_det.data.shapes.NUM_IMAGES", {"val": 2})
    source = resolve("shapes_val")
    assert not Path(source.json_file).exists()
    prepare(source)
    assert Path(source.json_file).exists() and len(list(Path(source.image_root).iterdir())) == 2
    prepare(resolve("coco_2017_val"))  # nothing to generate
