"""From a configuration to a model: the one place where config keys become keyword arguments.

The order in which parts are built is Detectron2's, so that the same ``torch.manual_seed`` gives the same weights.
Values that a config alone can be checked for are refused by :mod:`gn_det.config.check`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from gn_det.errors import ConfigError
from gn_det.kernels.dispatch import MODES
from gn_det.modeling.anchors import AnchorGenerator
from gn_det.modeling.boxes import BoxCoder
from gn_det.modeling.cascade import CascadeRoIHeads
from gn_det.modeling.fpn import FPN
from gn_det.modeling.heads import BoxHead, BoxPredictor, MaskHead
from gn_det.modeling.layers import FeatureSpec
from gn_det.modeling.mask_rcnn import MaskRCNN
from gn_det.modeling.matcher import Matcher
from gn_det.modeling.poolers import RoIPooler
from gn_det.modeling.resnet import BottleneckBlock, ResNet, freeze, make_stage
from gn_det.modeling.resnet_v2 import ResNetV2
from gn_det.modeling.roi_heads import Res5RoIHeads, RoIHeads, RoISampler, StandardRoIHeads
from gn_det.modeling.rpn import RPN, RPNHead
from gn_det.norm import GroupRule, NormFactory

logger = logging.getLogger(__name__)

#: A configuration node: attribute access to keys.
Cfg = Any


def group_rule(cfg: Cfg) -> GroupRule:
    """The rule for groups from MODEL.GN; Detectron2's fixed 32 where a config has no such section."""
    gn = cfg.MODEL.get("GN", None)
    if gn is None:
        return GroupRule()
    # Configs stored before there were these two keys lack them.
    fused, recompute = gn.get("FUSED", "auto"), bool(gn.get("RECOMPUTE", False))
    if fused not in MODES:
        raise ConfigError(f"MODEL.GN.FUSED = {fused!r}: use one of {', '.join(MODES)}")
    _log_kernels(fused, str(cfg.MODEL.DEVICE))
    return GroupRule(gn.NUM_GROUPS, gn.CHANNELS_PER_GROUP, gn.EPS, fused, recompute)


def norm_factory(cfg: Cfg, section: str) -> NormFactory | None:
    """The norm of MODEL.``section``.NORM with the groups of MODEL.GN and MODEL.WS.``section``; None for no norm."""
    norm, ws = cfg.MODEL[section].NORM, weight_standardization(cfg, section)
    return NormFactory(norm, group_rule(cfg), f"MODEL.{section}.NORM", ws) if norm else None


def weight_standardization(cfg: Cfg, section: str) -> str:
    """MODEL.WS.``section``; "" for configs without that section, as stored ones and Detectron2's own."""
    return str(cfg.MODEL.get("WS", {}).get(section, ""))


@functools.cache
def _log_kernels(fused: str, device: str) -> None:
    """Log once, on a GPU, which kernels GN runs on."""
    if not device.startswith("cuda"):
        return
    if fused == "on":
        logger.info("GN: fused Triton kernels (MODEL.GN.FUSED on).")
    else:
        why = ": the fused kernels have not been benchmarked on a GPU yet; on enables them" if fused == "auto" else ""
        logger.info("GN: torch's own kernels (MODEL.GN.FUSED %s%s).", fused, why)


def build_model(cfg: Cfg) -> MaskRCNN:
    """Build the detector on the CPU, in training mode, with fresh weights.

    Raises:
        ConfigError: a value that no model can be built from; the message names key or layer.
    """
    backbone = build_backbone(cfg)
    model = MaskRCNN(
        backbone=backbone,
        proposal_generator=build_rpn(cfg, backbone.feature_specs),
        roi_heads=build_roi_heads(cfg, backbone.feature_specs),
        pixel_mean=[float(v) for v in cfg.MODEL.PIXEL_MEAN],
        pixel_std=[float(v) for v in cfg.MODEL.PIXEL_STD],
    )
    freeze_parts(model, cfg.MODEL.FREEZE)
    return model


def freeze_parts(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the modules called ``names`` in place; their BatchNorm becomes FrozenBN, see :func:`freeze`.

    Raises:
        ConfigError: the model has no such module, or it has no weights.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and next(module.parameters(), None) is not None
    }
    for name in names:
        if name not in modules:
            parts = [part for part in modules if part.count(".") <= (part.startswith("roi_heads."))]
            raise ConfigError(
                f"MODEL.FREEZE: the model has no part {name!r} with weights; its parts are {', '.join(parts)}"
            )
        freeze(modules[name])


def build_backbone(cfg: Cfg) -> FPN | ResNet:
    """ResNet, or FPN on it; ``feature_specs`` of the result name its features."""
    bottom_up = ResNetV2 if is_pre_activation(cfg) else ResNet
    resnet = bottom_up(in_channels=len(cfg.MODEL.PIXEL_MEAN), **resnet_arguments(cfg))  # 1 with INPUT.FORMAT L
    return FPN(resnet, **fpn_arguments(cfg)) if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone" else resnet


def is_pre_activation(cfg: Cfg) -> bool:
    """Whether MODEL.RESNETS.VARIANT asks for :class:`ResNetV2`; Detectron2's own and stored configs lack the key."""
    return bool(cfg.MODEL.RESNETS.get("VARIANT", "v1") != "v1")


def resnet_arguments(cfg: Cfg) -> dict[str, Any]:
    """Keyword arguments of :class:`ResNet`, or of :class:`ResNetV2`."""
    resnets, norm = cfg.MODEL.RESNETS, norm_factory(cfg, "RESNETS")
    recompute = bool(cfg.MODEL.BACKBONE.get("RECOMPUTE", False))
    if recompute and norm is not None:  # what a block keeps for its norms is dropped with the rest of the block
        norm = dataclasses.replace(norm, rule=dataclasses.replace(norm.rule, recompute=False))
    shared = {
        "depth": resnets.DEPTH,
        "out_features": resnets.OUT_FEATURES,
        "stem_channels": resnets.STEM_OUT_CHANNELS,
        "res2_channels": resnets.RES2_OUT_CHANNELS,
        "width_per_group": resnets.WIDTH_PER_GROUP,
        "norm": norm,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "recompute": recompute,
    }
    if is_pre_activation(cfg):
        return {**shared, "variant": resnets.VARIANT}
    return {
        **shared,
        "num_groups": resnets.NUM_GROUPS,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
        "res5_dilation": resnets.RES5_DILATION,
    }


def fpn_arguments(cfg: Cfg) -> dict[str, Any]:
    """Keyword arguments of :class:`FPN`, without the bottom-up network."""
    return {
        "in_features": cfg.MODEL.FPN.IN_FEATURES,
        "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "norm": norm_factory(cfg, "FPN"),
        "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
    }


def _select(specs: dict[str, FeatureSpec], names: list[str], key: str) -> list[FeatureSpec]:
    missing = [name for name in names if name not in specs]
    if missing:  # what the backbone makes depends on more than the keys of features
        raise ConfigError(f"{key}: the backbone makes no feature {missing[0]!r}; it makes {', '.join(specs)}")
    selected = [specs[name] for name in names]
    if len({s.channels for s in selected}) != 1:
        raise ConfigError(f"{key} {list(names)}: needs features with the same number of channels")
    return selected


def _coder(weights: Any) -> BoxCoder:
    wx, wy, ww, wh = (float(w) for w in weights)
    return BoxCoder((wx, wy, ww, wh))


def build_rpn(cfg: Cfg, specs: dict[str, FeatureSpec]) -> RPN:
    """RPN on the backbone features described by ``specs``."""
    rpn, anchors = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
    levels = _select(specs, rpn.IN_FEATURES, "MODEL.RPN.IN_FEATURES")
    generator = AnchorGenerator(
        sizes=anchors.SIZES,
        aspect_ratios=anchors.ASPECT_RATIOS,
        strides=[s.stride for s in levels],
        offset=anchors.OFFSET,
    )
    return RPN(
        head=RPNHead(levels[0].channels, generator.num_anchors, conv_dims=rpn.CONV_DIMS),
        anchor_generator=generator,
        matcher=Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
        coder=_coder(rpn.BBOX_REG_WEIGHTS),
        in_features=rpn.IN_FEATURES,
        batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        pre_nms_topk=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
        post_nms_topk=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
        nms_thresh=rpn.NMS_THRESH,
        min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        boundary_thresh=rpn.BOUNDARY_THRESH,
        loss_weight_cls=rpn.LOSS_WEIGHT,
        loss_weight_loc=rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
        smooth_l1_beta=rpn.SMOOTH_L1_BETA,
        box_loss=rpn.BBOX_REG_LOSS_TYPE,
    )


def build_roi_heads(cfg: Cfg, specs: dict[str, FeatureSpec]) -> RoIHeads:
    """Standard heads or the shared res5 head, on the backbone features described by ``specs``."""
    heads = cfg.MODEL.ROI_HEADS
    if heads.NUM_CLASSES < 1:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES {heads.NUM_CLASSES}: set the number of classes, or name training data "
            "whose json tells it"
        )
    sampler = RoISampler(
        matcher=Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS),
        num_classes=heads.NUM_CLASSES,
        batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        append_gt=heads.PROPOSAL_APPEND_GT,
    )
    levels = _select(specs, heads.IN_FEATURES, "MODEL.ROI_HEADS.IN_FEATURES")
    build = {"Res5ROIHeads": _build_res5_heads, "CascadeROIHeads": _build_cascade}.get(
        heads.NAME, _build_standard_heads
    )
    return build(cfg, sampler, levels)


def _pooler(cfg: Cfg, node: Cfg, levels: list[FeatureSpec]) -> RoIPooler:
    return RoIPooler(
        node.POOLER_RESOLUTION,
        strides=[s.stride for s in levels],
        sampling_ratio=node.POOLER_SAMPLING_RATIO,
        kind=node.POOLER_TYPE,
        fused=group_rule(cfg).fused,
    )


def _box_predictor(cfg: Cfg, input_size: int, weights: Any = None) -> BoxPredictor:
    heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    return BoxPredictor(
        input_size,
        heads.NUM_CLASSES,
        coder=_coder(box.BBOX_REG_WEIGHTS if weights is None else weights),
        score_thresh=heads.SCORE_THRESH_TEST,
        nms_thresh=heads.NMS_THRESH_TEST,
        topk=cfg.TEST.DETECTIONS_PER_IMAGE,
        loss_weight_box=box.BBOX_REG_LOSS_WEIGHT,
        smooth_l1_beta=box.SMOOTH_L1_BETA,
        box_loss=box.BBOX_REG_LOSS_TYPE,
        class_agnostic=box.CLS_AGNOSTIC_BBOX_REG,
        class_weights=class_weights(cfg),
    )


def class_weights(cfg: Cfg) -> list[float] | None:
    """Weights of MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS in the order of the classes, background last.

    None without that key, or where the names of the classes are not known: the model is then not going to be trained.

    Raises:
        ConfigError: there is no class of a name, or it is given twice.
    """
    rows, names = cfg.MODEL.ROI_BOX_HEAD.get("CLASS_WEIGHTS", ()), tuple(cfg.MODEL.get("CLASS_NAMES", ()))
    if not rows or len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        return None
    known, given = (*names, "background"), [name for name, _ in rows]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: there is no class {name!r}; the classes are "
                f"{', '.join(names[:20])}{' ...' if len(names) > 20 else ''}, and background"
            )
        if given.count(name) > 1:
            raise ConfigError(f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: class {name!r} is given twice; remove one row")
    weights = dict(rows)
    return [float(weights.get(name, 1.0)) for name in known]


def _mask_head(cfg: Cfg, in_channels: int) -> MaskHead | None:
    if not cfg.MODEL.MASK_ON:
        return None
    mask = cfg.MODEL.ROI_MASK_HEAD
    return MaskHead(
        in_channels,
        1 if mask.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        conv_dims=[mask.CONV_DIM] * (mask.NUM_CONV + 1),
        norm=norm_factory(cfg, "ROI_MASK_HEAD"),
    )


def _box_head(cfg: Cfg, in_channels: int) -> BoxHead:
    box = cfg.MODEL.ROI_BOX_HEAD
    if box.NUM_FC < 1:
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.NUM_FC {box.NUM_FC}: {cfg.MODEL.ROI_HEADS.NAME} needs at least 1 (2fc, 4conv1fc)"
        )
    return BoxHead(
        in_channels,
        box.POOLER_RESOLUTION,
        conv_dims=[box.CONV_DIM] * box.NUM_CONV,
        fc_dims=[box.FC_DIM] * box.NUM_FC,
        norm=norm_factory(cfg, "ROI_BOX_HEAD"),
    )


def _pooled_parts(cfg: Cfg, levels: list[FeatureSpec]) -> dict[str, Any]:
    """What heads with a pooling of their own for boxes and masks have besides the box heads."""
    return {
        "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
        "box_pooler": _pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, levels),
        "mask_pooler": _pooler(cfg, cfg.MODEL.ROI_MASK_HEAD, levels) if cfg.MODEL.MASK_ON else None,
        "mask_head": _mask_head(cfg, levels[0].channels),
    }


def _build_standard_heads(cfg: Cfg, sampler: RoISampler, levels: list[FeatureSpec]) -> StandardRoIHeads:
    box_head = _box_head(cfg, levels[0].channels)
    box_predictor = _box_predictor(cfg, box_head.output_size)
    return StandardRoIHeads(
        sampler=sampler, box_head=box_head, box_predictor=box_predictor, **_pooled_parts(cfg, levels)
    )


def _build_cascade(cfg: Cfg, sampler: RoISampler, levels: list[FeatureSpec]) -> CascadeRoIHeads:
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    matchers = [Matcher([iou], [0, 1]) for iou in cascade.IOUS]
    heads, predictors = [], []
    for weights in cascade.BBOX_REG_WEIGHTS:
        heads.append(_box_head(cfg, levels[0].channels))
        predictors.append(_box_predictor(cfg, heads[-1].output_size, weights))
    return CascadeRoIHeads(
        sampler=dataclasses.replace(sampler, matcher=matchers[0]),
        matchers=matchers,
        box_heads=heads,
        box_predictors=predictors,
        **_pooled_parts(cfg, levels),
    )


def _build_res5_heads(cfg: Cfg, sampler: RoISampler, levels: list[FeatureSpec]) -> Res5RoIHeads:
    if len(levels) != 1:
        raise ConfigError("MODEL.ROI_HEADS.IN_FEATURES: Res5ROIHeads pools exactly one feature (C4: ['res4'])")
    res5, out_channels = build_res5(cfg)
    if levels[0].channels * 2 != out_channels:
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES: Res5ROIHeads takes {out_channels // 2} channels (res4), "
            f"got {levels[0].channels}"
        )
    return Res5RoIHeads(
        sampler=sampler,
        in_features=cfg.MODEL.ROI_HEADS.IN_FEATURES,
        pooler=_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, levels),
        res5=res5,
        box_predictor=_box_predictor(cfg, out_channels),
        mask_head=_mask_head(cfg, out_channels),
    )


def build_res5(cfg: Cfg) -> tuple[nn.Sequential, int]:
    """The stage that C4's heads share, and its output channels."""
    resnets = cfg.MODEL.RESNETS
    out_channels = resnets.RES2_OUT_CHANNELS * 8
    stage = make_stage(
        BottleneckBlock,
        3,
        in_channels=out_channels // 2,
        out_channels=out_channels,
        first_stride=2,
        bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 8,
        num_groups=resnets.NUM_GROUPS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        norm=norm_factory(cfg, "RESNETS"),
    )
    return stage, out_channels
