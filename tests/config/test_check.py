"""Limits of single keys, and of keys that depend on each other: the last good value passes, the first bad one fails."""

from __future__ import annotations

from typing import Any

import pytest

from gn_det.config import get_cfg, load_config
from gn_det.config.check import _least_weights, check_config
from gn_det.config.defaults import set_value
from gn_det.errors import ConfigError


def put(key: str, value: Any) -> Any:
    """The defaults with one value, of whatever type, put in."""
    cfg = get_cfg()
    set_value(cfg, key, value)
    return cfg


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("MODEL.BACKBONE.FREEZE_AT", [0, 5], [-1, 6]),
        ("MODEL.RPN.IOU_THRESHOLDS", [[0.3, 0.7], [0.1, 0.2]], [[0.0, 0.7], [0.3, 0.3], [0.7, 0.3]]),
        ("MODEL.RPN.IOU_LABELS", [[0, -1, 1], [0, 1, 1]], [[0, 1], [0, -1, 1, 1]]),
        ("MODEL.PIXEL_MEAN", [[1.0, 2.0, 3.0]], [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]),
        ("MODEL.PIXEL_STD", [[1.0, 2.0, 3.0]], [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 1.0]]),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [[False] * 4], [[False] * 3, [False] * 5]),
        ("DATASETS.PROPOSAL_FILES_TRAIN", [()], [("a",)]),
        ("MODEL.ROI_HEADS.IN_FEATURES", [["res4"], ["stem"]], [["p2"], ["res6"]]),
        ("SOLVER.GAMMA", [0.1], [float("nan"), float("inf")]),
        ("SOLVER.MOMENTUM", [0.0, 0.99], [1.0, -0.1]),
        ("SOLVER.IMS_PER_BATCH", [1, 65536], [0, 65537]),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", [0.0, 1.0], [-0.1, 1.1]),
    ],
)
def test_limits(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_config(put(key, value))
    for value in bad:
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            check_config(put(key, value))


def test_levels_that_a_pyramid_makes() -> None:
    """p6 is Mask R-CNN's last level; p7 is RetinaNet's, of another backbone."""
    cfg = load_config("gn_fpn.yaml")
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p6"]
    check_config(cfg)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p7"]
    with pytest.raises(ConfigError, match="has no 'p7'"):
        check_config(cfg)


@pytest.mark.parametrize("split", ["TRAIN", "VAL"])
@pytest.mark.parametrize(("given", "missing"), [("JSON", "IMAGES"), ("IMAGES", "JSON")])
def test_a_json_and_its_images_come_together(split: str, given: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^DATASETS\.{split}_{missing} is missing"):
        check_config(put(f"DATASETS.{split}_{given}", "a"))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("relative", [[1.0, 1.0], [0.1, 1]], [[1.1, 0.5], [0.0, 0.5]]),
        ("absolute", [[1, 1], [3, 400]], [[0, 5], [5, 0.5], [5.0, 5]]),
    ],
)
def test_sizes_of_crops(kind: str, good: list[Any], bad: list[Any]) -> None:
    """Parts up to the whole image, or one pixel and more."""
    for sizes, passes in ((good, True), (bad, False)):
        for size in sizes:
            cfg = put("INPUT.CROP.SIZE", size)
            cfg.INPUT.CROP.TYPE = kind
            if passes:
                check_config(cfg)
                continue
            with pytest.raises(ConfigError, match=r"INPUT\.CROP\.SIZE"):
                check_config(cfg)


def test_sections_of_other_models_are_refused_where_they_are_not_read() -> None:
    key, value = "MODEL.RETINANET.NUM_CONVS", 3
    with pytest.raises(ConfigError, match=f"{key} is .* not implemented by the embedded .* detectron2 runs it"):
        check_config(put(key, value))
    check_config(put(key, value), "detectron2")
    for engine in ("embedded", "detectron2"):
        with pytest.raises(ConfigError, match=f"not implemented by the {engine} engine; use 128$"):
            check_config(put("MODEL.SEM_SEG_HEAD.CONVS_DIM", 7), engine)


@pytest.mark.parametrize("engine", ["embedded", "detectron2"])
def test_weight_standardization_needs_a_norm(engine: str) -> None:
    for section, good in (("RESNETS", "GN"), ("FPN", "BN"), ("ROI_MASK_HEAD", "SyncBN")):
        keys = [f"MODEL.WS.{section}", "jhu", f"MODEL.{section}.NORM"]
        check_config(load_config("gn_fpn", [*keys, good], check=False), engine)
        with pytest.raises(
            ConfigError, match=rf"MODEL\.WS\.{section} jhu .* set MODEL\.{section}\.NORM GN, or MODEL\.WS"
        ):
            check_config(load_config("gn_fpn", [*keys, ""], check=False), engine)
    with pytest.raises(ConfigError, match=r"MODEL\.WS\.FPN is 'wsc'; it must be one of '', 'jhu', 'bit', 'timm'"):
        load_config("gn_fpn", ["MODEL.WS.FPN", "wsc"])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"], r"one entry for each stage; they have 2 and 3$"),
        (
            ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False"],
            r"needs MODEL\.ROI_BOX_HEAD\.CLS_AGNOSTIC_BBOX_REG True$",
        ),
        (["MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.4]"], r"must begin with MODEL\.ROI_HEADS\.IOU_THRESHOLDS \[0\.4\]$"),
    ],
)
@pytest.mark.parametrize("engine", ["embedded", "detectron2"])
def test_stages_of_a_cascade(keys: list[str], named: str, engine: str) -> None:
    """Both engines need what Detectron2 asserts."""
    cascade = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    check_config(load_config("gn_fpn", cascade), engine)
    with pytest.raises(ConfigError, match=named):
        check_config(load_config("gn_fpn", [*cascade, *keys], check=False), engine)


def test_weights_of_a_model_are_bounded() -> None:
    """At 2^30: a box head of 32 x 32 x 256 x FC_DIM weights, and 0.03 billion of the rest."""
    keys = ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "32", "MODEL.ROI_BOX_HEAD.FC_DIM"]
    load_config("gn_fpn", [*keys, "3900"])
    with pytest.raises(ConfigError, match=r"^MODEL describes about 1\d{9} weights, but at most 1073741824 are allowed"):
        load_config("gn_fpn", [*keys, "4096"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gn_fpn", []),
        ("gn_c4", []),
        ("gn_fpn", ["MODEL.ROI_HEADS.NUM_CLASSES", "20000"]),
        ("gn_c4", ["MODEL.ROI_HEADS.NUM_CLASSES", "20000"]),
        ("gn_fpn", ["MODEL.ROI_BOX_HEAD.NUM_CONV", "64"]),
        ("gn_fpn", ["MODEL.ROI_MASK_HEAD.NUM_CONV", "64"]),
        ("gn_fpn", ["MODEL.ROI_BOX_HEAD.FC_DIM", "8192", "MODEL.ROI_BOX_HEAD.NUM_FC", "4"]),
        ("gn_fpn", ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "28"]),
        ("gn_fpn", ["MODEL.RESNETS.WIDTH_PER_GROUP", "512"]),
        ("gn_fpn", ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "32"]),
    ],
)
def test_weights_are_counted_as_the_model_has_them(name: str, keys: list[str]) -> None:
    """The estimate is that of the model that is built, from 15 % below to 5 % above, whichever part is the largest."""
    import torch

    from gn_det.modeling import build_model

    cfg = load_config(name, ["MODEL.ROI_HEADS.NUM_CLASSES", "3", *keys])
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in build_model(cfg).parameters())
    assert 0.85 * weights < _least_weights(cfg) < 1.05 * weights
