"""Identity: the plugin's modules inside Detectron2's models give the numbers of Detectron2's own modules.

float32 on the CPU: initial weights of the same seed and everything that inference gives differ by exactly 0, losses by
at most 1e-6, gradients by at most 1e-5 of their norm. Where Detectron2 has no such norm (other groups, LN, IN), the
embedded engine is what is compared with. Weights are calibrated (see golden/model_cases.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import build_optimizer

from gn_det.config import get_cfg as embedded_cfg
from gn_det.detectron2 import GNFPN, GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead, GNResNet
from gn_det.modeling import build_model as build_embedded
from gn_det.norm import GroupRule, NormFactory
from tests.detectron2.cases import build_plugin, gn_modules, plugin_cfg, without_plugin
from tests.golden.d2_side import build_detectron2, detectron2_detections, detectron2_losses, to_detectron2
from tests.golden.model_cases import BATCHES, calibration_batch, configure, fill_weights, flatten, measure_calibration

pytestmark = pytest.mark.detectron2

#: Golden cases whose modules are, all or in part, the plugin's; r18 with GN joins them.
GN_CASES = ["gn_fpn", "bn_fpn_gn_head", "gn_c4", "resnext", "r18"]
R18_GN = {"MODEL__RESNETS__NORM": "GN", "MODEL__FPN__NORM": "GN"}


def changes_of(case: str) -> dict[str, Any]:
    return R18_GN if case == "r18" else {}


def calibrated(case: str, **changes: Any) -> dict[str, Tensor]:
    """Weights of the embedded engine's model of a case."""
    model = build_embedded(configure(embedded_cfg(), case, **changes))
    fill_weights(model)
    measure_calibration(model, calibration_batch())
    return model.state_dict()


@pytest.fixture(scope="module", params=["r18"])  # the others: tests/equality/test_model_equality.py
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Detectron2 with the plugin's modules and with its own: the same seed, then the same calibrated weights."""
    changes = changes_of(request.param)
    torch.manual_seed(3)
    ours = build_plugin(request.param, **changes)
    torch.manual_seed(3)
    theirs = build_detectron2(request.param, **changes)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert gn_modules(ours) and not gn_modules(theirs)
    weights = calibrated(request.param, **changes)
    for model in (ours, theirs):
        model.load_state_dict(weights, strict=True)
    return ours, theirs


def assert_same_instances(ours: Any, theirs: Any) -> int:
    for p, q in zip(ours, theirs, strict=True):
        for name, value in q.get_fields().items():
            other = p.get(name)
            value, other = (getattr(v, "tensor", v) for v in (value, other))
            assert torch.equal(other, value), name
    return sum(len(p) for p in ours)


@pytest.mark.parametrize("batch", BATCHES)
def test_inference(pair: tuple[nn.Module, nn.Module], batch: str) -> None:
    (proposals, detections), (expected_proposals, expected) = (
        detectron2_detections(model, BATCHES[batch]()) for model in pair
    )
    assert assert_same_instances(proposals, expected_proposals) > 0
    assert assert_same_instances(detections, expected) > 0


@pytest.mark.parametrize("batch", ["two_sizes", "one_empty", "bitmaps", "all_empty"])
def test_training(pair: tuple[nn.Module, nn.Module], batch: str) -> None:
    ours, theirs = pair
    (losses, scalars), (expected, expected_scalars) = (detectron2_losses(m, BATCHES[batch](), 5) for m in pair)
    assert list(losses) == list(expected)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-6, abs=1e-9), name
    assert scalars == pytest.approx(expected_scalars, rel=1e-5, abs=1e-6, nan_ok=True)
    for model, terms in ((ours, losses), (theirs, expected)):
        model.zero_grad()
        sum(terms.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()) + 1e-12, name


@pytest.mark.parametrize(
    "changes",
    [
        {"MODEL__GN__NUM_GROUPS": 8},
        {"MODEL__GN__CHANNELS_PER_GROUP": 16, "MODEL__GN__EPS": 1e-3},
        {f"MODEL__{part}__NORM": "LN" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")},
        {f"MODEL__{part}__NORM": "IN" for part in ("RESNETS", "FPN", "ROI_MASK_HEAD")},
    ],
    ids=["8 groups", "16 channels", "LN", "IN"],
)
def test_norms_that_detectron2_does_not_have(changes: dict[str, Any]) -> None:
    """The same detections as the embedded engine's, and others than with 32 groups."""
    weights = calibrated("gn_fpn", **changes)
    ours = build_plugin("gn_fpn", **changes)
    embedded = build_embedded(configure(embedded_cfg(), "gn_fpn", **changes))
    for model in (ours, embedded):
        model.load_state_dict(weights, strict=True)
    scenes = BATCHES["two_sizes"]()
    _, instances = detectron2_detections(ours, scenes)
    embedded.eval()
    for p, d in zip(instances, embedded.detect(flatten(scenes)), strict=True):
        assert torch.equal(p.pred_boxes.tensor, d.boxes) and torch.equal(p.scores, d.scores) and len(p)
        assert torch.equal(p.pred_masks.bool(), d.masks)
    usual = build_plugin("gn_fpn")
    usual.load_state_dict(weights, strict=True)
    _, others = detectron2_detections(usual, scenes)
    assert not torch.equal(others[0].pred_boxes.tensor, instances[0].pred_boxes.tensor)


def test_backbone_contract() -> None:
    for case, divisor, names in (
        ("gn_fpn", 32, ["p2", "p3", "p4", "p5", "p6"]),
        ("gn_c4", 0, ["res4"]),
    ):
        ours, theirs = (build_backbone(configure(cfg, case)) for cfg in (plugin_cfg(), get_cfg()))
        assert ours.output_shape() == theirs.output_shape() and list(ours.output_shape()) == names
        assert ours.size_divisibility == theirs.size_divisibility == divisor
        assert ours.padding_constraints == theirs.padding_constraints
    assert build_backbone(configure(plugin_cfg(), "gn_c4"), ShapeSpec(channels=5)).stem.conv1.in_channels == 5


@pytest.mark.parametrize("case", GN_CASES)
def test_optimizer_groups(case: str) -> None:
    """Detectron2's optimizer sees gamma and beta as norm parameters: the same groups as with its own modules."""

    def groups(model: nn.Module, cfg: Any) -> dict[str, tuple[float, float]]:
        names = {p: n for n, p in model.named_parameters()}
        return {
            names[p]: (g["lr"], g["weight_decay"])
            for g in build_optimizer(cfg, model).param_groups
            for p in g["params"]
        }

    changes = changes_of(case)
    cfg = configure(plugin_cfg(), case, **changes, SOLVER__WEIGHT_DECAY_NORM=0.0, SOLVER__BIAS_LR_FACTOR=2.0)
    ours, theirs = build_model(cfg), build_model(without_plugin(cfg))
    table = groups(ours, cfg)
    assert table == groups(theirs, cfg)
    norms = [n for n in table if ".norm." in n]
    assert norms and all(table[n][1] == 0.0 for n in norms)
    assert all(decay > 0 for n, (_, decay) in table.items() if n not in norms)


# ---------------------------------------------------------------- other models on the backbone

_RETINA = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": 24,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 20, 25], [32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406]],
}
_CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}


@pytest.mark.parametrize("keys", [_RETINA, _CASCADE, {"MODEL.MASK_ON": False}], ids=["retinanet", "cascade", "faster"])
def test_other_architectures(keys: dict[str, Any]) -> None:
    """They build on the plugin's modules, and training and inference give Detectron2's own numbers."""
    cfg = configure(plugin_cfg(), "gn_fpn")
    cfg.merge_from_list([part for item in keys.items() for part in item])
    torch.manual_seed(1)
    ours = build_model(cfg)
    torch.manual_seed(1)
    theirs = build_model(without_plugin(cfg))
    assert {"GNFPN", "GNResNet"} <= gn_modules(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    scenes = BATCHES["two_sizes"]()
    (losses, _), (expected, _) = (detectron2_losses(m, scenes, 2) for m in (ours, theirs))
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-9), name
    with torch.no_grad():
        results = [m.eval()([to_detectron2(s) for s in scenes]) for m in (ours, theirs)]
    assert_same_instances(*[[r["instances"] for r in result] for result in results])


def test_test_time_augmentation() -> None:
    cfg = configure(plugin_cfg(), "gn_fpn", TEST__AUG__MIN_SIZES=(64, 96), INPUT__MASK_FORMAT="bitmask")
    weights = calibrated("gn_fpn")
    results = []
    for c in (cfg, without_plugin(cfg)):
        model = build_model(c)
        model.load_state_dict(weights)
        scene = to_detectron2(BATCHES["tiny_odd"]()[0])
        del scene["instances"]
        scene["height"], scene["width"] = scene["image"].shape[-2:]
        with torch.no_grad():
            results.append([r["instances"] for r in GeneralizedRCNNWithTTA(c, model.eval())([scene])])
    assert assert_same_instances(*results) > 0


# ---------------------------------------------------------------- LazyConfig


def test_lazy_config() -> None:
    """Explicit keywords, nested as in Detectron2's Python configs, build what the YAML builds."""
    norm = L(NormFactory)(kind="GN", rule=L(GroupRule)(num_groups=8))
    backbone = L(GNFPN)(
        bottom_up=L(GNResNet)(
            depth=50,
            stem_channels=32,
            res2_channels=64,
            width_per_group=32,
            out_features=["res2", "res3", "res4", "res5"],
            norm=norm,
            freeze_at=2,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=64,
        norm=norm,
        top_block=L(LastLevelMaxPool)(),
    )
    convs = {"conv_norm": norm}
    pooled = [L(ShapeSpec)(channels=64, height=side, width=side) for side in (7, 14)]
    box = L(GNFastRCNNConvFCHead)(input_shape=pooled[0], conv_dims=[64] * 4, fc_dims=[64], **convs)
    mask = L(GNMaskRCNNConvUpsampleHead)(input_shape=pooled[1], num_classes=24, conv_dims=[64] * 5, **convs)
    model = build_plugin("gn_fpn", MODEL__GN__NUM_GROUPS=8)
    made = {"backbone": backbone, "roi_heads.box_head": box, "roi_heads.mask_head": mask}
    for name, lazy in made.items():
        built, part = instantiate(lazy), model.get_submodule(name)
        assert repr(built) == repr(part)
        built.load_state_dict(part.state_dict(), strict=True)
        assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in part.parameters()]


def test_norms_by_callable() -> None:
    """As in Detectron2, code may give a callable instead of a name."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels)

    backbone = GNFPN(
        GNResNet(depth=50, out_features=["res4", "res5"], norm=norm),
        in_features=["res4", "res5"],
        out_channels=32,
        norm=norm,
    )
    assert {m.num_groups for m in backbone.modules() if isinstance(m, nn.GroupNorm)} == {4}
    assert list(backbone.output_shape()) == ["p4", "p5"]  # no top block
