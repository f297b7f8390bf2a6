"""Identity: with the same weights, seed and images the embedded engine and Detectron2 give the same numbers.

Detectron2 stands for two models: with its own modules ("own") and with those that gn_det registers ("registered").
float32 on the CPU: proposals, boxes, scores, classes and pasted masks differ by exactly 0; losses by at most 1e-6 and
gradients by at most 1e-5 of their norm. Weights are calibrated (see golden/model_cases.py), so that all anchor shapes
and many classes take part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2.modeling", reason="compares with an installed Detectron2")

from detectron2.config import get_cfg as detectron2_cfg
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer

from gn_det.config import get_cfg
from gn_det.engine.optimizer import build_optimizer
from gn_det.modeling import build_model
from gn_det.modeling.census import norm_census
from tests.equality.pairs import Pair, make_pair
from tests.equality.table import FAMILIES
from tests.golden.d2_side import (
    SIDES,
    build_detectron2,
    build_registered,
    detectron2_detections,
    detectron2_losses,
    registered_cfg,
)
from tests.golden.model_cases import (
    BATCHES,
    CASES,
    Scene,
    configure,
    flatten,
)

pytestmark = pytest.mark.detectron2
Measured = Callable[[str, str, str, float], None]


#: The registered modules in the families of the table and in ResNeXt; Detectron2's own in every case.
_PAIRS = [("own", case) for case in CASES] + [("registered", case) for case in (*FAMILIES, "resnext")]


@pytest.fixture(scope="module", params=_PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    side, case = request.param
    return make_pair(case, side)


@pytest.fixture
def note(request: pytest.FixtureRequest, measured: Measured) -> Callable[[str, float], None]:
    """``measured`` for the case and side of ``pair``."""
    side, case = request.node.callspec.params["pair"]
    return lambda check, off: measured(case, check, side, off)


def assert_same_detections(pair: Pair, scenes: list[Scene]) -> list[int]:
    """0 difference in everything inference gives; returns the numbers of detections."""
    ours, theirs = pair
    their_proposals, their_detections = detectron2_detections(theirs, scenes)
    ours.eval()
    proposals, _ = ours.detect_raw(flatten(scenes))
    detections = ours.detect(flatten(scenes))
    for p, q in zip(proposals, their_proposals):
        assert torch.equal(p.boxes, q.proposal_boxes.tensor)
        assert torch.equal(p.logits, q.objectness_logits)
    for d, e in zip(detections, their_detections):
        assert d.image_size == e.image_size
        assert torch.equal(d.boxes, e.pred_boxes.tensor)
        assert torch.equal(d.scores, e.scores)
        assert torch.equal(d.classes, e.pred_classes)
        assert (d.masks is not None) == e.has("pred_masks")
        if d.masks is not None:
            assert torch.equal(d.masks, e.pred_masks.bool())
    return [len(d) for d in detections]


class TrainingOff(NamedTuple):
    """Our losses, and how far they and the gradients are from Detectron2's."""

    losses: dict[str, Tensor]
    loss_off: float
    grad_off: float


def compare_training(pair: Pair, scenes: list[Scene], seed: int = 5) -> TrainingOff:
    """One forward and backward on both sides: largest relative difference of a loss and of a gradient (by its norm)."""
    ours, theirs = pair
    expected, scalars = detectron2_losses(theirs, scenes, seed)
    ours.train()
    ours.pop_metrics()
    torch.manual_seed(seed)
    losses = ours(flatten(scenes))
    assert list(losses) == list(expected)
    assert ours.pop_metrics() == pytest.approx(scalars, rel=1e-5, abs=1e-6)
    loss_off = max(abs(v.item() - expected[k].item()) / max(abs(expected[k].item()), 1e-3) for k, v in losses.items())
    for model, terms in ((ours, losses), (theirs, expected)):
        model.zero_grad()
        sum(terms.values()).backward()
    grad_off = 0.0
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert p.requires_grad == q.requires_grad, name
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            grad_off = max(grad_off, float((p.grad - q.grad).norm()) / (float(q.grad.norm()) + 1e-7))
    return TrainingOff(losses, loss_off, grad_off)


def assert_same_training(pair: Pair, scenes: list[Scene], seed: int = 5) -> dict[str, Tensor]:
    """Losses, scalars and every gradient; returns our losses."""
    losses, loss_off, grad_off = compare_training(pair, scenes, seed)
    assert loss_off <= 1e-6
    assert grad_off <= 1e-5
    return losses


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_initial_weights(case: str, side: str) -> None:
    """Names, order, shapes, what is frozen, and every drawn number."""
    torch.manual_seed(3)
    ours = build_model(configure(get_cfg(), case))
    torch.manual_seed(3)
    theirs = SIDES[side](case)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]


def test_the_sides_are_what_they_say() -> None:
    def ours(model: nn.Module) -> set[str]:
        return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("gn_det.detectron2")}

    heads = {"GNFastRCNNConvFCHead", "GNMaskRCNNConvUpsampleHead"}
    for case in ("gn_fpn", "bn_fpn"):
        assert ours(build_detectron2(case)) == set()
        assert ours(build_registered(case)) == {"GNFPN", "GNResNet", *heads}
    assert ours(build_registered("bn_c4")) == {"GNResNet", "GNRes5ROIHeads", "GNMaskRCNNConvUpsampleHead"}


@pytest.mark.parametrize("batch", BATCHES)
def test_inference(pair: Pair, batch: str, note: Callable[[str, float], None]) -> None:
    """Odd sizes, batches of one and two, few and many objects."""
    note("inference", 0.0)  # anything else fails
    assert sum(assert_same_detections(pair, BATCHES[batch]())) > 0


@pytest.mark.parametrize("batch", BATCHES)
def test_training(pair: Pair, batch: str, note: Callable[[str, float], None]) -> None:
    _, loss_off, grad_off = compare_training(pair, BATCHES[batch]())
    note("losses", loss_off)
    note("gradients", grad_off)
    assert loss_off <= 1e-6
    assert grad_off <= 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", FAMILIES)
def test_optimizer_groups(case: str, side: str, measured: Measured) -> None:
    """The same parameters in the same groups and order, with the same lr, decay and momentum."""
    changes = {"SOLVER__WEIGHT_DECAY_NORM": 0.0, "SOLVER__BIAS_LR_FACTOR": 2.0, "SOLVER__WEIGHT_DECAY_BIAS": 3e-5}
    ours, theirs = build_model(configure(get_cfg(), case)), SIDES[side](case)
    names = [{p: n for n, p in m.named_parameters()} for m in (ours, theirs)]
    made = (
        build_optimizer(configure(get_cfg(), case, **changes), ours),
        build_detectron2_optimizer(configure(detectron2_cfg(), case, **changes), theirs),
    )
    rows = [
        [({**g, "params": [name[p] for p in g["params"]], "foreach": None}) for g in optimizer.param_groups]
        for optimizer, name in zip(made, names)
    ]
    measured(case, "groups", side, float(rows[0] != rows[1]))
    assert rows[0] == rows[1] and len(rows[0]) >= 2


def test_many_detections() -> None:
    """More than 2000 per image: the other branch of batched NMS, and no limit on detections."""
    pair = make_pair(
        "gn_fpn",
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
        MODEL__ROI_HEADS__NMS_THRESH_TEST=0.95,
        MODEL__RPN__POST_NMS_TOPK_TEST=150,
        MODEL__MASK_ON=False,
        TEST__DETECTIONS_PER_IMAGE=-1,
    )
    assert min(assert_same_detections(pair, BATCHES["tiny_odd"]())) > 2000


def test_no_detections() -> None:
    for case in ("gn_fpn", "bn_c4"):
        pair = make_pair(case, MODEL__ROI_HEADS__SCORE_THRESH_TEST=1.0)
        assert assert_same_detections(pair, BATCHES["two_sizes"]()) == [0, 0]


def test_min_size_drops_every_proposal() -> None:
    """MIN_SIZE larger than the image: 0 RoIs reach the heads at inference, ground truth alone in training."""
    for case in ("gn_fpn", "bn_c4"):
        pair = make_pair(case)  # calibrated with proposals
        for model in pair:
            model.proposal_generator.min_box_size = 500.0
        assert assert_same_detections(pair, BATCHES["tiny_odd"]()) == [0]
        assert_same_training(pair, BATCHES["two_sizes"]())
        assert_same_training(pair, BATCHES["all_empty"]())  # 0 RoIs in training


def test_saturated_logits() -> None:
    """Objectness beyond sigmoid's range, and full of ties: order must come from the logits."""
    pair = make_pair("gn_fpn")
    for model in pair:
        layer = model.proposal_generator.rpn_head.objectness_logits
        with torch.no_grad():
            layer.weight *= 30
            layer.bias += 200
    assert_same_detections(pair, BATCHES["two_sizes"]())
    for model in pair:
        nn.init.zeros_(model.proposal_generator.rpn_head.objectness_logits.weight)
    assert_same_detections(pair, BATCHES["two_sizes"]())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", ["proposal_generator.rpn_head.anchor_deltas", "roi_heads.box_predictor.bbox_pred"])
def test_non_finite_deltas(layer: str, value: float) -> None:
    """Inference drops such rows; training stops on such proposals."""
    pair = make_pair("gn_fpn")

    def spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., ::3] = value  # every third column or class-wise delta
        if output.dim() == 2:
            output[::2] = 0.1
        return output

    for model in pair:
        dict(model.named_modules())[layer].register_forward_hook(spoil)
    assert_same_detections(pair, BATCHES["two_sizes"]())
    if layer.endswith("anchor_deltas") and value != -float("inf"):
        for model in pair:
            model.train()
        with pytest.raises(FloatingPointError):
            detectron2_losses(pair[1], BATCHES["two_sizes"](), 5)
        with pytest.raises(FloatingPointError):
            pair[0](flatten(BATCHES["two_sizes"]()))


#: Keys that another implementation may ignore silently: (key, value, "train" or "test" must change).
KEYS: list[tuple[str, Any, str]] = [
    ("MODEL.RPN.BOUNDARY_THRESH", 0, "train"),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 20, "train"),
    ("MODEL.RPN.POSITIVE_FRACTION", 0.1, "train"),
    ("MODEL.RPN.IOU_THRESHOLDS", [0.2, 0.4], "train"),
    ("MODEL.RPN.IOU_LABELS", [0, 0, 1], "train"),
    ("MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.5, 1.5), "test"),
    ("MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 3.0, "train"),
    ("MODEL.RPN.LOSS_WEIGHT", 0.3, "train"),
    ("MODEL.RPN.SMOOTH_L1_BETA", 0.5, "train"),
    ("MODEL.RPN.NMS_THRESH", 0.4, "test"),
    ("MODEL.RPN.PRE_NMS_TOPK_TEST", 30, "test"),
    ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "train"),
    ("MODEL.RPN.CONV_DIMS", [-1, 32], "test"),
    ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 24, "test"),
    ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "test"),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.3, 1.5]], "test"),
    ("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "train"),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3], "train"),
    ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.05, "train"),
    ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.2, "test"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (5.0, 5.0, 2.0, 2.0), "test"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 2.0, "train"),
    ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.5, "train"),
    ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2, "test"),
    ("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2, "train"),
    ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7, "train"),
    *[("MODEL.RPN.BBOX_REG_LOSS_TYPE", kind, "train") for kind in ("giou", "diou", "ciou")],
    *[("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", kind, "train") for kind in ("giou", "diou", "ciou")],
    *[("MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind, "test") for kind in ("ROIAlign", "ROIPool")],
    *[("MODEL.ROI_MASK_HEAD.POOLER_TYPE", kind, "train") for kind in ("ROIAlign", "ROIPool")],
    ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "test"),
    ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True, "train"),
    ("MODEL.RESNETS.STRIDE_IN_1X1", False, "test"),
    ("MODEL.FPN.FUSE_TYPE", "avg", "test"),
    ("MODEL.PIXEL_MEAN", [80.0, 90.0, 100.0], "test"),
    ("MODEL.PIXEL_STD", [50.0, 60.0, 70.0], "test"),
    ("TEST.DETECTIONS_PER_IMAGE", 7, "test"),
]


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], Tensor]:
    pair = make_pair("bn_fpn")
    losses = assert_same_training(pair, BATCHES["crowded"]())
    pair[0].eval()
    return losses, torch.cat([d.boxes for d in pair[0].detect(flatten(BATCHES["crowded"]()))])


@pytest.mark.parametrize("key, value, kind", KEYS, ids=[f"{k}-{v}" for k, v, _ in KEYS])
def test_key_is_read(key: str, value: Any, kind: str, reference: tuple[dict[str, Tensor], Tensor]) -> None:
    """Both engines agree, and the key changes the result: it is not ignored."""
    pair = make_pair("bn_fpn", **{key.replace(".", "__"): value})
    scenes = BATCHES["crowded"]()
    assert_same_detections(pair, scenes)
    losses = assert_same_training(pair, scenes)
    if kind == "train":
        assert any(not torch.equal(losses[k], reference[0][k]) for k in losses)
    else:
        boxes = torch.cat([d.boxes for d in pair[0].eval().detect(flatten(scenes))])
        assert boxes.shape != reference[1].shape or not torch.equal(boxes, reference[1])


def test_positive_quota_is_saturated() -> None:
    """The crowded batch really has more candidates than the quota takes."""
    model = make_pair("gn_fpn")[0]
    model.train()
    model(flatten(BATCHES["crowded"]()))
    assert model.pop_metrics()["roi_head/num_fg_samples"] == 8  # 0.25 of 32


def test_dilated_c5() -> None:
    """RES5_DILATION 2 with standard heads on res5 alone."""
    pair = make_pair(
        "gn_fpn",
        MODEL__BACKBONE__NAME="build_resnet_backbone",
        MODEL__RESNETS__OUT_FEATURES=["res5"],
        MODEL__RESNETS__RES5_DILATION=2,
        MODEL__ANCHOR_GENERATOR__SIZES=[[16, 32, 64]],
        MODEL__RPN__IN_FEATURES=["res5"],
        MODEL__ROI_HEADS__IN_FEATURES=["res5"],
    )
    assert_same_detections(pair, BATCHES["two_sizes"]())
    assert_same_training(pair, BATCHES["two_sizes"]())


def test_weight_standardization() -> None:
    """Detectron2's model on the registered modules has it too, and BiT's backbone; norms of Detectron2's are routed."""
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    pair = make_pair("gn_fpn", "registered", **{f"MODEL__WS__{part}": "jhu" for part in parts})
    assert sum(bool(getattr(m, "ws", "")) for m in pair[1].modules()) == 53 + 8 + 4 + 4
    assert_same_training(pair, BATCHES["two_sizes"]())
    assert sum(assert_same_detections(pair, BATCHES["two_sizes"]())) > 0
    keys = {"MODEL__RESNETS__VARIANT": "bit", "MODEL__WS__RESNETS": "timm", "MODEL__RESNETS__STRIDE_IN_1X1": False}
    pair = make_pair("gn_fpn", "registered", **keys)
    assert_same_training(pair, BATCHES["two_sizes"]())
    assert sum(assert_same_detections(pair, BATCHES["two_sizes"]())) > 0
    routed = build_detectron2_model(configure(registered_cfg(), "bn_fpn_gn_head", MODEL__WS__RESNETS="timm"))
    assert {r.norm for r in norm_census(routed) if r.stage == "res4"} == {"FrozenBN+WS"}


def test_cascade_of_two_stages() -> None:
    """Stages, IoUs and weights are read; without objects every box is background; an IoU loss."""
    stages = {
        "MODEL__ROI_BOX_CASCADE_HEAD__IOUS": (0.4, 0.75),
        "MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS": ((8.0, 8.0, 4.0, 4.0), (20.0, 20.0, 10.0, 10.0)),
        "MODEL__ROI_HEADS__IOU_THRESHOLDS": [0.4],
    }
    pair = make_pair("cascade", MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="ciou", **stages)
    losses = assert_same_training(pair, BATCHES["crowded"]())
    assert list(losses)[:4] == ["loss_cls_stage0", "loss_box_reg_stage0", "loss_cls_stage1", "loss_box_reg_stage1"]
    assert_same_training(pair, BATCHES["all_empty"]())
    assert sum(assert_same_detections(pair, BATCHES["crowded"]())) > 0


@pytest.mark.parametrize("case", ["gn_fpn", "gn_c4", "r18", "cascade"])
def test_trajectory(case: str) -> None:
    """Five SGD steps with momentum end in the same weights: sampling stays in step too."""
    pair = make_pair(case)
    names = ["two_sizes", "one_empty", "crowded", "bitmaps", "tiny_odd"]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in pair]
    for step, name in enumerate(names):
        assert_same_training(pair, BATCHES[name](), seed=step)
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(pair[0].state_dict().items(), pair[1].state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("config", ["gn_fpn", "bn_c4"])
def test_real_width(config: str) -> None:
    """R-50 at full width, 80 classes, the paper's heads."""
    wide = {
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 256,
        "MODEL__RESNETS__WIDTH_PER_GROUP": 64,
        "MODEL__ROI_HEADS__NUM_CLASSES": 80,
        "MODEL__ROI_MASK_HEAD__CONV_DIM": 256,
    }
    if config == "gn_fpn":
        wide |= {
            "MODEL__FPN__OUT_CHANNELS": 256,
            "MODEL__ROI_BOX_HEAD__CONV_DIM": 256,
            "MODEL__ROI_BOX_HEAD__FC_DIM": 1024,
        }
    pair = make_pair(config, **wide)
    assert_same_detections(pair, BATCHES["two_sizes"]())
    assert_same_training(pair, BATCHES["two_sizes"]())
