"""What each engine implements: everything else is refused by name, never ignored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from fvcore.common.config import CfgNode as CN

from gn_det.errors import ConfigError
from gn_det.inputs import bit_depth_range

NORMS = ("", "GN", "LN", "IN", "BN", "SyncBN", "FrozenBN")

#: Norms that only Detectron2 has.
_THEIR_NORMS = ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

#: Sections of other models: any value that differs from the default is refused by the embedded engine.
OTHER_MODELS = (
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.SEM_SEG_HEAD",
    "MODEL.PANOPTIC_FPN",
    "MODEL.RETINANET",
    "TEST.AUG",
    "TEST.PRECISE_BN",
    "GLOBAL",
)

#: Keys that the embedded engine knows only with these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "VERSION": (2,),
    "VIS_PERIOD": (0,),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "build_resnet_fpn_backbone"),
    "MODEL.GN.FUSED": ("auto", "on", "off"),
    "MODEL.FPN.NORM": NORMS,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": NORMS,
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False, False, False, False],),
    "MODEL.RESNETS.DEFORM_MODULATED": (False,),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": (1,),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.ANGLES": ([[-90, 0, 90]],),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads"),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.NORM": NORMS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2",),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (False,),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": (0.5,),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": (50,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.NORM": NORMS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2",),
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": (False,),
    "INPUT.FORMAT": ("BGR", "RGB", "L"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "DATASETS.PROPOSAL_FILES_TRAIN": ((),),
    "DATASETS.PROPOSAL_FILES_TEST": ((),),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": (2000,),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": (1000,),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.AMP.DTYPE": ("bf16", "fp16"),
    "TEST.KEYPOINT_OKS_SIGMAS": ([],),
}

_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_POOLERS = ("ROIAlignV2", "ROIAlign", "ROIPool")

#: Keys of which Detectron2 takes more under ``--engine detectron2``; None for any value.
_ON_DETECTRON2: dict[str, tuple[Any, ...] | None] = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "RetinaNet"),
    "MODEL.BACKBONE.NAME": (
        "build_resnet_backbone",
        "build_resnet_fpn_backbone",
        "build_retinanet_resnet_fpn_backbone",
        "build_gn_resnet_backbone",
        "build_gn_resnet_fpn_backbone",
        "build_gn_retinanet_resnet_fpn_backbone",
    ),
    "MODEL.FPN.NORM": (*NORMS, *_THEIR_NORMS),
    "MODEL.RESNETS.NORM": (*NORMS, *_THEIR_NORMS),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": None,
    "MODEL.RESNETS.DEFORM_MODULATED": (False, True),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": None,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads", "GNRes5ROIHeads"),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead", "GNFastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.NORM": (*NORMS, *_THEIR_NORMS),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (False, True),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False, True),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False, True),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead", "GNMaskRCNNConvUpsampleHead"),
    "MODEL.ROI_MASK_HEAD.NORM": (*NORMS, *_THEIR_NORMS),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": (False, True),
}

#: Sections of other models that ``--engine detectron2`` trains.
_SECTIONS_ON_DETECTRON2 = ("MODEL.ROI_BOX_CASCADE_HEAD", "MODEL.RETINANET")

_POSITIVE = ("> 0", lambda v: v > 0)
_NOT_NEGATIVE = (">= 0", lambda v: v >= 0)
_FRACTION = ("between 0 and 1", lambda v: 0 <= v <= 1)

_INCREASING = ("increasing numbers > 0", lambda v: all(a < b for a, b in itertools.pairwise((0, *v))))
_NAMES = ("a list of names", lambda v: all(isinstance(name, str) and name for name in v))
_FOUR = ("4 numbers > 0", lambda v: len(v) == 4 and all(w > 0 for w in v))

#: Keys with a range.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "MODEL.BACKBONE.FREEZE_AT": ("0 to 5", lambda v: 0 <= v <= 5),
    "MODEL.FPN.OUT_CHANNELS": _POSITIVE,
    "MODEL.GN.NUM_GROUPS": _POSITIVE,
    "MODEL.GN.CHANNELS_PER_GROUP": _NOT_NEGATIVE,
    "MODEL.GN.EPS": _POSITIVE,
    "MODEL.PIXEL_STD": ("> 0", lambda v: all(s > 0 for s in v)),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _POSITIVE,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _POSITIVE,
    "MODEL.RESNETS.NUM_GROUPS": _POSITIVE,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _POSITIVE,
    "MODEL.RPN.IOU_THRESHOLDS": _INCREASING,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _FOUR,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _POSITIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _POSITIVE,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _POSITIVE,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _POSITIVE,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _INCREASING,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _FOUR,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _POSITIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _POSITIVE,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _POSITIVE,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _POSITIVE,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _NOT_NEGATIVE,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _NOT_NEGATIVE,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _POSITIVE,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _POSITIVE,
    "MODEL.RPN.POSITIVE_FRACTION": _FRACTION,
    "MODEL.RPN.NMS_THRESH": _FRACTION,
    "MODEL.ROI_HEADS.NUM_CLASSES": _NOT_NEGATIVE,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _POSITIVE,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _FRACTION,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _FRACTION,
    "INPUT.MIN_SIZE_TRAIN": ("positive sizes", lambda v: len(v) > 0 and all(s > 0 for s in v)),
    "INPUT.MAX_SIZE_TRAIN": _POSITIVE,
    "INPUT.MIN_SIZE_TEST": _NOT_NEGATIVE,
    "INPUT.MAX_SIZE_TEST": _POSITIVE,
    "INPUT.MAX_PIXELS": _POSITIVE,
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "MODEL.CLASS_NAMES": _NAMES,
    "SOLVER.NO_RESCALE": _NAMES,
    "DATALOADER.NUM_WORKERS": _NOT_NEGATIVE,
    "DATALOADER.MAX_BAD": _NOT_NEGATIVE,
    "SOLVER.MAX_ITER": _POSITIVE,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.MOMENTUM": ("at least 0 and below 1", lambda v: 0 <= v < 1),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.STEPS": ("increasing iterations", lambda v: all(s > 0 for s in v) and list(v) == sorted(set(v))),
    "SOLVER.WARMUP_ITERS": _NOT_NEGATIVE,
    "SOLVER.CHECKPOINT_PERIOD": _POSITIVE,
    "SOLVER.CHECKPOINT_KEEP": _POSITIVE,
    # far beyond any device: such a batch would be gathered for hours before the memory ends
    "SOLVER.IMS_PER_BATCH": ("between 1 and 65536", lambda v: 1 <= v <= 65536),
    "SOLVER.ACCUMULATE": _POSITIVE,
    "SOLVER.EPOCHS": _NOT_NEGATIVE,
    "SOLVER.EMA.DECAY": ("at least 0 and below 1", lambda v: 0 <= v < 1),
    "SOLVER.MAX_HOURS": _NOT_NEGATIVE,
    "SOLVER.REFERENCE_BATCH": _NOT_NEGATIVE,
    "SOLVER.REFERENCE_WORLD_SIZE": _NOT_NEGATIVE,
    "TEST.EVAL_PERIOD": _NOT_NEGATIVE,
    "TEST.PATIENCE": _NOT_NEGATIVE,
    "TEST.DETECTIONS_PER_IMAGE": _POSITIVE,
    "TEST.MAX_DETS": _POSITIVE,
    "TEST.EXPECTED_RESULTS": (
        "a list of [task, metric, value, tolerance]",
        lambda v: all(isinstance(row, (list, tuple)) and len(row) == 4 for row in v),
    ),
}


def _get(cfg: CN, dotted: str) -> Any:
    node: Any = cfg
    for part in dotted.split("."):
        node = node[part]
    return node


def _same(a: Any, b: Any) -> bool:
    """Equality where a list and a tuple of the same values are the same."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def check_config(cfg: CN, engine: str = "embedded") -> None:
    """Refuse values that are out of range, contradict each other, or that the engine does not implement.

    Args:
        cfg: merged from files and command line.
        engine: "embedded" or "detectron2", the one that is to run.

    Raises:
        ConfigError: names the key, its value and what is allowed, and the other engine where that one takes it.
    """
    on_detectron2 = engine == "detectron2"
    for key, known in _ONLY.items():
        value = _get(cfg, key)
        there = _ON_DETECTRON2.get(key, known)
        allowed = there if on_detectron2 else known
        if not _is_among(value, allowed):
            names = " or ".join(repr(a) for a in allowed or ())
            raise _refused(key, value, on_detectron2, f"; it knows {names}", _is_among(value, there))
    for section in OTHER_MODELS:
        theirs = section in _SECTIONS_ON_DETECTRON2
        if not (on_detectron2 and theirs):
            _check_unchanged(section, _get(cfg, section), _get(_defaults(), section), on_detectron2, theirs)
    for key, (what, holds) in _RANGES.items():
        value = _get(cfg, key)
        if not holds(value):
            raise ConfigError(f"{key} = {value!r} must be {what}")
    bit_depth_range(cfg.INPUT.BIT_DEPTH)
    _check_finite("", cfg)
    _check_model(cfg)
    _check_data(cfg)


def _is_among(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    return allowed is None or any(_same(value, a) for a in allowed)


def _refused(key: str, value: Any, on_detectron2: bool, known: str, on_the_other: bool) -> ConfigError:
    engine = "detectron2" if on_detectron2 else "embedded"
    text = f"{key} = {value!r} is not implemented by the {engine} engine{known}"
    return ConfigError(f"{text}; --engine detectron2 runs it" if on_the_other and not on_detectron2 else text)


def _check_finite(prefix: str, node: Any) -> None:
    if isinstance(node, Mapping):
        for name, value in node.items():
            _check_finite(f"{prefix}.{name}" if prefix else name, value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _check_finite(prefix, value)
    elif isinstance(node, float) and not math.isfinite(node):
        raise ConfigError(f"{prefix} = {node!r} must be a finite number")


def _defaults() -> CN:
    from gn_det.config.defaults import get_cfg

    return get_cfg()


def _check_unchanged(
    prefix: str, node: Mapping[str, Any], default: Mapping[str, Any], on_detectron2: bool, theirs: bool
) -> None:
    for name, value in node.items():
        dotted = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            _check_unchanged(dotted, value, default[name], on_detectron2, theirs)
        elif not _same(value, default[name]):
            raise _refused(dotted, value, on_detectron2, "; remove the key", theirs)


def _check_model(cfg: CN) -> None:
    model = cfg.MODEL
    resnets = model.RESNETS
    if resnets.DEPTH in (18, 34):
        wants = {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "RES5_DILATION": 1}
        for name, value in wants.items():
            if resnets[name] != value:
                raise ConfigError(f"MODEL.RESNETS.{name} must be {value} for MODEL.RESNETS.DEPTH {resnets.DEPTH}")
    fpn = "_fpn_" in model.BACKBONE.NAME
    names = ["p2", "p3", "p4", "p5", "p6", "p7"] if fpn else ["stem", "res2", "res3", "res4", "res5"]
    if model.BACKBONE.NAME == "build_resnet_fpn_backbone":
        names.remove("p7")
    for key in ("RETINANET",) if model.META_ARCHITECTURE == "RetinaNet" else ("RPN", "ROI_HEADS"):
        for feature in model[key].IN_FEATURES:
            if feature not in names:
                raise ConfigError(
                    f"MODEL.{key}.IN_FEATURES: '{feature}' is not made by MODEL.BACKBONE.NAME "
                    f"{model.BACKBONE.NAME}; it makes {', '.join(names)}"
                )
    if fpn and list(model.FPN.IN_FEATURES) != list(resnets.OUT_FEATURES):
        raise ConfigError("MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES must name the same features")
    if fpn and "Res5ROIHeads" in model.ROI_HEADS.NAME and model.META_ARCHITECTURE == "GeneralizedRCNN":
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} does not go with MODEL.BACKBONE.NAME {model.BACKBONE.NAME}; "
            "FPN takes StandardROIHeads"
        )
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    for name in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[name]) != channels:
            numbers = "3 numbers" if channels == 3 else "one number, such as [103.53], for INPUT.FORMAT L"
            raise ConfigError(f"MODEL.{name} must hold {numbers}, got {model[name]!r}")


def _check_data(cfg: CN) -> None:
    data = cfg.DATASETS
    for split in ("TRAIN", "VAL"):
        json_file, images = data[f"{split}_JSON"], data[f"{split}_IMAGES"]
        if bool(json_file) != bool(images):
            missing = f"DATASETS.{split}_{'IMAGES' if json_file else 'JSON'}"
            raise ConfigError(
                f"{missing} is missing (flag --{missing[9:].lower().replace('_', '-')}); set both or none"
            )
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of SOLVER.ACCUMULATE {solver.ACCUMULATE}"
        )
