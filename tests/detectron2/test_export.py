"""Export with Detectron2's own tools: scripted and traced models give the model's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from gn_det.config import get_cfg as embedded_cfg
from gn_det.modeling import build_model as build_embedded
from tests.detectron2.cases import build_plugin, plugin_cfg
from tests.golden.d2_side import build_detectron2, to_detectron2
from tests.golden.model_cases import BATCHES, calibration_batch, configure, fill_weights, measure_calibration

# Tracing warns of every constant that Detectron2 turns into one on purpose.
pytestmark = [pytest.mark.detectron2, pytest.mark.filterwarnings("ignore")]

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}


def calibrated(case: str) -> nn.Module:
    model = build_embedded(configure(embedded_cfg(), case))
    fill_weights(model)
    measure_calibration(model, calibration_batch())
    plugin = build_plugin(case)
    plugin.load_state_dict(model.state_dict())
    return plugin.eval()


def inputs() -> list[dict[str, Any]]:
    scene = to_detectron2(BATCHES["two_sizes"]()[0])
    return [{"image": scene["image"]}]


@pytest.mark.parametrize("case", ["gn_fpn", "gn_c4"])
def test_scripting(case: str) -> None:
    model = calibrated(case)
    try:
        scripting_with_instances(build_detectron2(case).eval(), FIELDS)
    except Exception as error:
        pytest.skip(f"this Detectron2 cannot script its own modules with this torch: {error}")
    with torch.no_grad():
        expected = model.inference(inputs(), do_postprocess=False)[0]
    names = list(model.state_dict())
    scripted = scripting_with_instances(copy.deepcopy(model), FIELDS)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        got = scripted.inference(inputs(), do_postprocess=False)[0]
    assert len(expected) and torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(got.scores, expected.scores) and torch.equal(got.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("case", ["gn_fpn", "gn_c4"])
def test_tracing(case: str) -> None:
    model = calibrated(case)
    adapter = TracingAdapter(model, inputs(), lambda m, x: m.inference(x, do_postprocess=False)[0])
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs)
        other = [{"image": to_detectron2(BATCHES["tiny_odd"]()[0])["image"]}]
        expected = model.inference(other, do_postprocess=False)[0]
        got = adapter.outputs_schema(traced(*TracingAdapter(model, other).flattened_inputs))
    assert len(expected) and torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(got.pred_masks, expected.pred_masks)


def test_retinanet_backbone_scripts() -> None:
    """Top levels from res5 by convolution, average fusion."""
    cfg = configure(plugin_cfg(), "gn_fpn", MODEL__FPN__FUSE_TYPE="avg")
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    backbone = build_model(cfg).backbone.eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, got = backbone(x), torch.jit.script(backbone)(x)
    assert list(got) == list(expected) and all(torch.equal(got[k], expected[k]) for k in expected)
