"""Test-time augmentation without Detectron2: one size alone is plain inference."""

from __future__ import annotations

import pytest
import torch

from gn_det.config import get_cfg, load_config
from gn_det.engine.engines import Engine
from gn_det.errors import ConfigError
from gn_det.modeling import build_model
from tests.golden.model_cases import (
    BATCHES,
    calibration_batch,
    configure,
    fill_weights,
    flatten,
    measure_calibration,
)


def test_one_size_is_plain_inference() -> None:
    """Resized by 1, joined with nothing: the same boxes, scores, classes and masks; also where nothing is found."""
    cfg = configure(get_cfg(), "gn_fpn")
    model = build_model(cfg)
    fill_weights(model)
    measure_calibration(model, calibration_batch())
    model.eval()
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.FLIP = True, False
    sample = flatten(BATCHES["two_sizes"]())[0]
    sample["height"], sample["width"] = sample["image"].shape[1:]
    cfg.TEST.AUG.MIN_SIZES = (min(sample["image"].shape[1:]),)
    plain, augmented = model([sample])[0], Engine().detector(model, cfg)([sample])[0]
    assert len(plain) > 3
    for part in ("boxes", "scores", "classes", "masks"):
        assert torch.equal(getattr(plain, part), getattr(augmented, part))
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[-1] = 1e4
    assert len(Engine().detector(model, cfg)([sample])[0]) == 0


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"TEST.AUG.ENABLED True is for GeneralizedRCNN, not RetinaNet"):
        from gn_det.config.check import check_config

        keys = ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet"]
        check_config(load_config("gn_fpn.yaml", keys, check=False), "detectron2")
