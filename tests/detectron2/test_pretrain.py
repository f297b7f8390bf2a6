"""Weights of ``gn-det classify`` in Detectron2: its own checkpointer reads them, and so does the plugin's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from gn_det.checkpoint.weights import load_weights
from gn_det.classification.classifier_loop import Normalize
from tests.classification.test_export import INPUT, exported, pixels
from tests.detectron2.cases import plugin_cfg, without_plugin

pytestmark = pytest.mark.detectron2

R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
CASES = [
    ("resnet18", "GN", "gn_fpn.yaml", R18),
    ("resnet18", "BN", "bn_fpn.yaml", R18),
    ("resnet50", "GN", "gn_fpn.yaml", []),
    ("resnet50", "BN", "bn_fpn.yaml", ["MODEL.RESNETS.STRIDE_IN_1X1", False]),
]


@pytest.mark.parametrize("reader", ["plugin", "detectron2"])
@pytest.mark.parametrize("arch, norm, config, overrides", CASES)
def test_features_equal_the_trunk(
    tmp_path: Path, arch: str, norm: str, config: str, overrides: list[Any], reader: str
) -> None:
    """0 difference for GN; FrozenBN is another expression than BN in eval mode, hence 1e-5 of the largest value."""
    classifier, path = exported(tmp_path, arch, norm)
    cfg = plugin_cfg(config, "MODEL.ROI_HEADS.NUM_CLASSES", 2, *overrides)
    model = build_model(cfg if reader == "plugin" else without_plugin(cfg)).eval()
    if reader == "plugin":
        load_weights(model, path, cfg)
    else:
        DetectionCheckpointer(model).load(str(path))
    with torch.no_grad():
        given = Normalize(INPUT)(pixels())
        expected = classifier.trunk(given)["res5"]
        found = model.backbone.bottom_up((pixels().float() - model.pixel_mean) / model.pixel_std)["res5"]
    difference = float((found - expected).abs().max())
    assert difference <= (1e-5 if norm == "BN" else 0.0) * float(expected.abs().max()), difference
