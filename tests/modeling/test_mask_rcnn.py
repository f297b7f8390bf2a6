"""The whole model: names, freezing, empty inputs, autocast, errors, census."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gn_det.config import get_cfg, load_config
from gn_det.errors import ConfigError
from gn_det.kernels.weight_standardization import standardize
from gn_det.modeling import MaskRCNN, build_model
from gn_det.modeling import boxes as box_ops
from gn_det.modeling.anchors import AnchorGenerator
from gn_det.modeling.census import CensusRow, format_census, norm_census, sum_census
from gn_det.modeling.layers import fold_weights
from gn_det.modeling.matcher import Matcher, sample_labels
from gn_det.modeling.metrics import Metrics
from gn_det.modeling.postprocess import paste_masks, resize_detections
from gn_det.modeling.rpn import RPNHead
from gn_det.norm import FrozenBatchNorm2d
from gn_det.structures import Detections, Targets
from tests.golden.model_cases import BATCHES, configure, flatten, make_scene, to_sample
from tests.test_configs import EMBEDDED


def tiny(case: str = "gn_fpn", **changes: Any) -> MaskRCNN:
    torch.manual_seed(0)
    return build_model(configure(get_cfg(), case, **changes))


def losses_of(model: MaskRCNN, batch: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    losses = model.train()(flatten(BATCHES[batch]()))
    assert isinstance(losses, dict)
    return losses


@pytest.mark.parametrize("case", ["gn_fpn", "gn_c4"])
@pytest.mark.parametrize("batch", ["one_empty", "all_empty"])
def test_images_without_objects(case: str, batch: str) -> None:
    """All losses are finite, and every trainable parameter gets a gradient (DDP would hang otherwise)."""
    model = tiny(case)
    losses = losses_of(model, batch)
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    if batch == "all_empty":
        assert losses["loss_mask"] == 0 and losses["loss_box_reg"] == 0 and losses["loss_rpn_loc"] == 0


@pytest.mark.parametrize("case", ["gn_fpn", "gn_c4", "bn_fpn"])
def test_no_rois(case: str) -> None:
    """No proposal survives: detections are empty with the right shapes, training still has gradients."""
    model = tiny(case)
    model.proposal_generator.min_box_size = 1e6
    found = model.eval()(flatten(BATCHES["two_sizes"]()))
    for d, scene in zip(found, BATCHES["two_sizes"]()):
        assert len(d) == 0 and d.boxes.shape == (0, 4) and d.masks.shape == (0, *scene.output)
    losses = losses_of(model, "all_empty")
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("size", [(33, 70), (31, 31), (65, 64)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    """Boxes and masks refer to the wanted output size; images are padded to a multiple of 32 with zeros."""
    model = tiny(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0)
    sample = to_sample(make_scene(3, *size, 2))
    images, sizes = model.preprocess([sample])
    assert sizes == [size] and images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0
    assert not images[:, :, size[0] :].any() and not images[:, :, :, size[1] :].any()
    mean = model.pixel_mean
    torch.testing.assert_close(images[0, :, : size[0], : size[1]], sample["image"] - mean, rtol=0, atol=0)
    (found,) = model.eval()([sample])
    height, width = sample["height"], sample["width"]
    assert found.image_size == (height, width) and found.masks.shape == (len(found), height, width)
    assert found.masks.dtype == torch.bool and len(found) > 0
    assert found.boxes.min() >= 0 and (found.boxes[:, 2] <= width).all() and (found.boxes[:, 3] <= height).all()
    assert (found.scores[:-1] >= found.scores[1:]).all()


def test_without_masks() -> None:
    model = tiny("bn_c4_boxes")
    assert "loss_mask" not in losses_of(model, "tiny_odd")
    assert model.eval()(flatten(BATCHES["tiny_odd"]()))[0].masks is None


def test_metrics_are_averaged_and_forgotten() -> None:
    model = tiny()
    losses_of(model, "tiny_odd")
    once = model.pop_metrics()
    losses_of(model, "tiny_odd")
    losses_of(model, "tiny_odd")
    assert model.pop_metrics() == pytest.approx(once)
    assert model.pop_metrics() == {}
    assert {"rpn/num_pos_anchors", "roi_head/num_fg_samples", "fast_rcnn/cls_accuracy"} <= set(once)


def test_autocast_decodes_in_float32() -> None:
    """bf16 features, float32 boxes and scores: they move by less than bf16's 8 bits of a coordinate would."""
    model = tiny().eval()
    seen: list[torch.dtype] = []
    model.roi_heads.box_predictor.bbox_pred.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        proposals, found = model.detect_raw(flatten(BATCHES["two_sizes"]()))
        losses = losses_of(model, "two_sizes")
        sum(losses.values()).backward()
    assert seen[0] == torch.bfloat16
    assert all(p.boxes.dtype == torch.float32 for p in proposals)
    assert all(d.boxes.dtype == d.scores.dtype == torch.float32 for d in found)
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    # Not on bf16's grid: a coordinate near 100 there has steps of 0.5.
    boxes = torch.cat([p.boxes for p in proposals])
    assert (boxes != boxes.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["gn_fpn", "r18"])
def test_freeze_at(case: str, freeze_at: int) -> None:
    """Frozen stages have no trainable tensor, BatchNorm there becomes FrozenBN, GN keeps normalizing."""
    model = tiny(case, MODEL__BACKBONE__FREEZE_AT=freeze_at)
    stages = ["stem", "res2", "res3", "res4", "res5"]
    for k, stage in enumerate(stages, start=1):
        module = getattr(model.backbone.bottom_up, stage)
        trains = any(p.requires_grad for p in module.parameters())
        assert trains == (k > freeze_at), stage
        norms = [m for n, m in module.named_modules() if n.endswith("norm")]
        if case == "r18":
            assert {type(m) for m in norms} == {FrozenBatchNorm2d if k <= freeze_at else nn.BatchNorm2d}
        else:
            assert all(isinstance(m, nn.GroupNorm) for m in norms)


@pytest.mark.parametrize("case", ["gn_fpn", "r18"])
def test_frozen_parts_neither_train_nor_update_statistics(case: str) -> None:
    """MODEL.FREEZE: only the rest gets gradients, and no buffer moves."""
    parts = ("backbone.bottom_up", "proposal_generator", "roi_heads.box_head")
    model = tiny(case, MODEL__FREEZE=parts)
    buffers = {name: b.clone() for name, b in model.backbone.bottom_up.named_buffers()}
    sum(losses_of(model, "two_sizes").values()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(parts), name
    assert all(torch.equal(b, buffers[name]) for name, b in model.backbone.bottom_up.named_buffers())
    assert {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} <= {nn.BatchNorm2d}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.bottom_up.modules())
    rows = {row.stage: row for row in norm_census(model)}
    assert rows["res4"].trainable == rows["box head"].trainable == 0 and rows["fpn"].trainable == rows["fpn"].layers * 2


def test_class_weights_are_a_weighted_mean() -> None:
    """loss_cls is sum(w_c l) / sum(w_c) over the RoIs; equal weights change nothing, and no weight is saved."""
    weights = {"MODEL__CLASS_NAMES": ("a", "b", "c"), "MODEL__ROI_HEADS__NUM_CLASSES": 3}
    rows = {"MODEL__ROI_BOX_HEAD__CLASS_WEIGHTS": [["b", 4.0], ["background", 0.5]]}
    plain, weighted = (tiny(**weights, **more).roi_heads.box_predictor for more in ({}, rows))
    assert plain.class_weights is None and weighted.class_weights.tolist() == [1.0, 4.0, 1.0, 0.5]
    assert plain.state_dict().keys() == weighted.state_dict().keys()
    torch.manual_seed(0)
    logits, classes, boxes = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1]), torch.rand(6, 4) + torch.arange(4)
    ours = weighted.losses(logits, torch.zeros(6, 12), boxes, boxes, classes, Metrics())["loss_cls"]
    each, w = -logits.log_softmax(1)[range(6), classes], weighted.class_weights[classes]
    torch.testing.assert_close(ours, (w * each).sum() / w.sum())
    empty = weighted.losses(logits[:0], torch.zeros(0, 12), boxes[:0], boxes[:0], classes[:0], Metrics())
    assert empty["loss_cls"] == 0


@pytest.mark.parametrize(
    ("rows", "text"),
    [([["sell", 2.0]], "there is no class 'sell'; the classes are cell, and background"),
     ([["cell", 2.0], ["cell", 3.0]], "class 'cell' is given twice")],
)  # fmt: skip
def test_bad_class_weights_are_refused(rows: list[Any], text: str) -> None:
    one = {"MODEL__CLASS_NAMES": ("cell",), "MODEL__ROI_HEADS__NUM_CLASSES": 1}
    with pytest.raises(ConfigError, match=f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: {text}"):
        tiny(**one, MODEL__ROI_BOX_HEAD__CLASS_WEIGHTS=rows)


@pytest.mark.parametrize("case", ["gn_fpn", "gn_c4", "bn_fpn"])
def test_recomputed_backbone_has_the_same_bits(case: str) -> None:
    """Gradient checkpointing: equal losses and gradients, and a fraction of the activations is kept."""
    found = []
    for recompute in (False, True):
        model, kept = tiny(case, MODEL__BACKBONE__RECOMPUTE=recompute, MODEL__BACKBONE__FREEZE_AT=1), [0]

        def pack(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += t.numel()
            return t

        features = model.train().backbone
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features(torch.zeros(1, 3, 64, 64))
        losses = losses_of(model, "two_sizes")
        sum(losses.values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses, grads, kept[0]))
    (losses, grads, kept), (losses_2, grads_2, kept_2) = found
    assert all(torch.equal(value, losses_2[name]) for name, value in losses.items())
    assert grads.keys() == grads_2.keys() and all(torch.equal(g, grads_2[name]) for name, g in grads.items())
    assert kept_2 < kept / 3


@pytest.mark.parametrize("part", ["backbon", "roi_heads.box_pooler", ""])
def test_unknown_part_to_freeze_is_refused(part: str) -> None:
    parts = "backbone, proposal_generator, roi_heads, roi_heads.box_head, roi_heads.box_predictor, roi_heads.mask_head"
    with pytest.raises(ConfigError, match=rf"MODEL.FREEZE: the model has no part '{part}' with weights.*{parts}$"):
        tiny(MODEL__FREEZE=(part,))


@pytest.mark.parametrize("norm", ["GN", "LN", "IN", "BN", "SyncBN", "FrozenBN", ""])
def test_every_norm_in_every_part(norm: str) -> None:
    """Each part takes each norm by its own key; biases exist exactly where there is no norm."""
    model = tiny(
        MODEL__RESNETS__NORM=norm,
        MODEL__FPN__NORM=norm,
        MODEL__ROI_BOX_HEAD__NORM=norm,
        MODEL__ROI_MASK_HEAD__NORM=norm,
    )
    state = model.state_dict()
    for conv in ("backbone.fpn_lateral3", "roi_heads.box_head.conv1", "roi_heads.mask_head.mask_fcn2"):
        assert (f"{conv}.bias" in state) == (norm == "")
        assert (f"{conv}.norm.weight" in state) == (norm != "")
    assert "backbone.bottom_up.stem.conv1.bias" not in state
    rows = {r.stage: r for r in norm_census(model)}
    assert {rows[s].norm for s in ("stem", "res4", "fpn", "box head", "mask head") if s in rows} <= {
        norm or "none",
        "FrozenBN",  # BatchNorm frozen by FREEZE_AT
    }
    assert rows["rpn"].norm == "none"


def test_groups_by_channels() -> None:
    model = tiny(MODEL__GN__CHANNELS_PER_GROUP=16, MODEL__GN__EPS=1e-3)
    norm = model.backbone.bottom_up.res4[0].conv3.norm
    assert norm.num_groups == norm.num_channels // 16 and norm.eps == 1e-3


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"MODEL__GN__NUM_GROUPS": 24}, ["MODEL.RESNETS.NORM GN", "32 channels", "1, 2, 4, 8, 16, 32"]),
        ({"MODEL__RESNETS__NORM": "BN", "MODEL__FPN__OUT_CHANNELS": 48}, ["MODEL.FPN.NORM GN", "48 channels"]),
        ({"MODEL__ROI_BOX_HEAD__CONV_DIM": 40}, ["MODEL.ROI_BOX_HEAD.NORM GN"]),
        ({"MODEL__ROI_MASK_HEAD__CONV_DIM": 40}, ["MODEL.ROI_MASK_HEAD.NORM GN"]),
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 0}, ["MODEL.ROI_HEADS.NUM_CLASSES"]),
        ({"MODEL__RPN__IN_FEATURES": ["p2", "p9"]}, ["MODEL.RPN.IN_FEATURES", "p9"]),
        ({"MODEL__FPN__IN_FEATURES": ["res2", "res4"]}, ["MODEL.FPN.IN_FEATURES"]),
        ({"MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64]]}, ["MODEL.ANCHOR_GENERATOR.SIZES"]),
        ({"MODEL__RPN__IOU_LABELS": [0, 1]}, ["IOU_LABELS"]),
        ({"MODEL__RESNETS__DEPTH": 51}, ["MODEL.RESNETS.DEPTH"]),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    """One line that names layer or key."""
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_divergence_stops_training() -> None:
    model = tiny()
    nn.init.constant_(model.proposal_generator.rpn_head.anchor_deltas.bias, float("nan"))
    with pytest.raises(FloatingPointError):
        losses_of(model, "tiny_odd")


def test_training_needs_targets_and_masks() -> None:
    model = tiny().train()
    sample = to_sample(make_scene(1, 64, 64, 2))
    sample["targets"].masks = None
    with pytest.raises(ValueError, match="masks"):
        model([sample])
    del sample["targets"]
    with pytest.raises(ValueError, match="targets"):
        model([sample])


def test_training_leaves_targets_alone() -> None:
    """Samples may be used again (several epochs from memory)."""
    sample = to_sample(make_scene(1, 64, 64, 3))
    classes, boxes = sample["targets"].classes.clone(), sample["targets"].boxes.clone()
    tiny().train()([sample])
    assert torch.equal(sample["targets"].classes, classes) and torch.equal(sample["targets"].boxes, boxes)


def test_census_of_the_long_schedule() -> None:
    """53 + 8 + 4 + 4 GN layers of 32 groups, 138 gamma and beta tensors, those of stem and res2 frozen."""
    rows = norm_census(build_model(load_config("gn_fpn_long.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "80"])))
    gn = [r for r in rows if r.norm == "GN"]
    assert {r.stage: r.layers for r in gn} == {
        **{"stem": 1, "res2": 10, "res3": 13, "res4": 19, "res5": 10},
        **{"fpn": 8, "box head": 4, "mask head": 4},
    }
    assert all(r.groups == (32,) for r in gn)
    assert sum(r.trainable + r.frozen for r in gn) == 138 and sum(r.frozen for r in gn) == 22
    assert CensusRow("rpn", "none", 0) in rows
    text = format_census(rows)
    assert "53 GN in backbone + 8 GN in fpn + 4 GN in box head + 4 GN in mask head" in text
    assert "138 gamma/beta tensors: 116 trainable, 22 frozen (22 by MODEL.BACKBONE.FREEZE_AT)" in text


WS = {f"MODEL__WS__{part}": "jhu" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}


def test_weight_standardization_in_every_part() -> None:
    """Equal to the plain model with weights standardized beforehand; no convolution without a norm is touched."""
    model, plain = tiny(**WS), tiny()
    assert list(model.state_dict()) == list(plain.state_dict())
    census = {r.stage: r.norm for r in norm_census(model)}
    assert census.pop("rpn") == "none" and set(census.values()) == {"GN+WS"} and len(census) == 8
    normed = [m for m in plain.modules() if isinstance(getattr(m, "norm", None), nn.Module)]
    with torch.no_grad():
        for conv in normed:
            conv.weight.copy_(standardize(conv.weight, "jhu"))
    scenes = flatten(BATCHES["two_sizes"]())
    ours, expected = losses_of(model, "two_sizes"), losses_of(plain, "two_sizes")
    assert ours == expected
    sum(ours.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    before = model.eval().detect_raw(scenes)[1]
    fold_weights(model)
    for d, e in zip(before, model.detect_raw(scenes)[1]):  # to the bit, and plain from now on
        assert torch.equal(d.boxes, e.boxes) and torch.equal(d.scores, e.scores) and torch.equal(d.masks, e.masks)
    assert {r.norm for r in norm_census(model)} == {"GN", "none"}


def test_weight_standardization_of_one_part() -> None:
    model = tiny("gn_c4", MODEL__WS__RESNETS="bit")
    rows = norm_census(model)
    assert {r.norm for r in rows if r.stage in ("stem", "res4", "res5 head")} == {"GN+WS"}
    assert sum_census(rows) == "43 GN+WS in backbone + 10 GN+WS in res5 head"


def test_every_shipped_config_builds_without_hidden_state() -> None:
    """On the meta device: every config gives a model, and no tensor was made outside of it."""
    for name in EMBEDDED:
        cfg = load_config(name, [])
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        with torch.device("meta"):
            model = build_model(cfg)
        assert all(t.is_meta for t in model.state_dict().values()), name


# ------------------------------------------------------------ edges of the small functions


def test_edges_of_boxes() -> None:
    """The left and upper margin belong to the image, the right and lower do not; sides grow by 1000 / 16 at most."""
    boxes = torch.tensor([[-2.0, -2, 9, 9], [-2.5, 0, 9, 9], [0, -2.5, 9, 9], [0, 0, 12, 9], [0, 0, 9, 12]])
    assert box_ops.inside(boxes, (10, 10), 2.0).tolist() == [True, False, False, False, False]
    grown = box_ops.BoxCoder().decode(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert grown.tolist()[0] == pytest.approx([-492, -492, 508, 508])
    empty = torch.zeros(1, 4)
    assert box_ops.pairwise_iou(empty, empty).item() == 0
    error = torch.tensor([0.25, -1.0])
    assert box_ops.smooth_l1_sum(error, torch.zeros(2), 0.5).item() == 0.0625 + 0.75
    assert box_ops.smooth_l1_sum(error, torch.zeros(2), 0.0).item() == 1.25


def test_edges_of_matching() -> None:
    """A threshold belongs to the label above it and is above 0; quotas are rounded down."""
    matcher = Matcher([0.25, 0.5], [0, -1, 1])
    assert matcher(torch.tensor([[0.2, 0.25, 0.4, 0.5, 1.0]]))[1].tolist() == [0, -1, -1, 1, 1]
    for wrong in ([0.0], [-0.5], [0.5, 0.25]):
        with pytest.raises(ConfigError, match="must be positive and increasing"):
            Matcher(wrong, [0] * len(wrong) + [1])
    labels = torch.tensor([1] * 9 + [0] * 9 + [-1] * 9)
    assert [len(found) for found in sample_labels(labels, 7, 0.5, 0)] == [3, 4]


def test_edges_of_masks() -> None:
    """A pixel of exactly the threshold belongs to the object, up to the last row and column of the box."""
    pasted = paste_masks(torch.full((1, 4, 4), 0.5), torch.tensor([[1.0, 2, 5, 6]]), 8, 8)
    assert pasted[0, 3:5, 2:4].all() and not pasted[0, :2].any() and not pasted[0, 6:].any()
    solid = paste_masks(torch.ones(1, 4, 4), torch.tensor([[1.0, 2, 5, 6]]), 8, 8)
    assert torch.equal(solid[0].nonzero().min(0).values, torch.tensor([2, 1])) and solid.sum() == 16


def test_edges_of_resized_detections() -> None:
    """Boxes are cut at the new image, and those that lie outside of it are dropped."""
    boxes = torch.tensor([[-1.0, 2, 12, 8], [10.5, 0, 12, 5]])
    found = resize_detections(Detections((10, 10), boxes, torch.ones(2), torch.tensor([3, 4]), None), 20, 40)
    assert found.boxes.tolist() == [[0, 4, 40, 16]] and found.classes.tolist() == [3]


def test_edges_of_settings() -> None:
    for offset, good in ((0.0, True), (0.99, True), (1.0, False), (-0.1, False)):
        arguments = {"sizes": [[8.0]], "aspect_ratios": [[1.0]], "strides": [4], "offset": offset}
        if good:
            assert AnchorGenerator(**arguments)([(1, 1)])[0].mean().item() == pytest.approx(4 * offset)
        else:
            with pytest.raises(ConfigError, match="must be at least 0 and below 1"):
                AnchorGenerator(**arguments)
    head = RPNHead(4, 3, conv_dims=(6, -1))
    assert [c.out_channels for c in head.modules() if isinstance(c, nn.Conv2d)] == [6, 6, 3, 12]


def test_a_margin_of_zero_leaves_out_what_leaves_the_image() -> None:
    """MODEL.RPN.BOUNDARY_THRESH 0 counts; -1 trains all anchors."""
    anchors = torch.tensor([[-1.0, 0, 8, 8], [0, 0, 8, 8]])
    target = Targets(image_size=(16, 16), boxes=anchors[:1].clip(min=0), classes=torch.zeros(1, dtype=torch.int64))
    for threshold, expected in ((-1, [0, 1]), (0, [1])):
        rpn = tiny(MODEL__RPN__BOUNDARY_THRESH=threshold).proposal_generator
        positive, negative, _ = rpn.sample_anchors(anchors, target)
        assert sorted([*positive.tolist(), *negative.tolist()]) == expected


def test_evaluation_leaves_out_proposals_that_are_not_finite() -> None:
    """Only training stops: an image that overflows (fp16) still gets the proposals of its other anchors."""
    rpn = tiny().proposal_generator
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16], [0, 8, 8, 16]])
    logits, deltas = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 3, 4)
    logits[0, 0], deltas[0, 1, 2] = float("inf"), float("nan")
    (found,) = rpn.eval().propose([anchors], [logits], [deltas], [(16, 16)])
    assert torch.equal(found.boxes, anchors[2:]) and found.logits.tolist() == [1.0]
    with pytest.raises(FloatingPointError):
        rpn.train().propose([anchors], [logits], [deltas], [(16, 16)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stages_of_a_cascade_that_are_not_finite(value: float) -> None:
    """Rows with nan are dropped in the end, whatever they pool in between; Detectron2 stops with an AssertionError."""
    model = tiny("cascade", MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0).eval()
    rows: list[int] = []

    def spoil(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[::2, ::3] = value
        rows.append(len(output))
        return output

    model.roi_heads.box_predictor[0].register_forward_hook(lambda m, i, o: (o[0], spoil(m, i, o[1])))
    (found,) = model.detect_raw(flatten(BATCHES["tiny_odd"]()))[1]
    assert rows and len(found) and bool(found.boxes.isfinite().all())


def test_sampled_anchors_come_in_anchor_order() -> None:
    """Whatever is drawn: losses are summed in that order, as Detectron2 sums them."""
    anchors = torch.tensor([[0.0, 0, 8, 8]]).repeat(20, 1)
    target = Targets(image_size=(16, 16), boxes=anchors[:1], classes=torch.zeros(1, dtype=torch.int64))
    torch.manual_seed(0)
    positive, _, matched = tiny().proposal_generator.sample_anchors(anchors, target)
    assert positive.tolist() == list(range(20)) and torch.equal(matched, anchors)
