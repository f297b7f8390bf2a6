"""Table of configuration keys: name, default, accepted values, description, and what each engine implements.

Names and defaults are Detectron2's, so its YAML files load unchanged. Keys marked ``ours`` exist only in gn_det, and
the Detectron2 plugin adds them. Three defaults differ on purpose: ``MODEL.DEVICE`` is ``"auto"``,
``MODEL.ROI_HEADS.NUM_CLASSES`` is 0 (taken from the data set) and ``DATALOADER.NUM_WORKERS`` is capped by the number of
cores at run time. To add a key, add an entry to the table and run ``gn-det configs --keys
> docs/reference/config.md``.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from gn_det.values import (
    FINITE,
    FLAG,
    Check,
    Value,
    every,
    integer,
    is_number,
    items,
    number,
    one_of,
    optional,
    row,
)


@dataclass(frozen=True)
class Key:
    """Declaration of one key.

    Attributes:
        name: dotted, such as ``SOLVER.BASE_LR``.
        default: also decides the type of values read from text.
        check: requirements of all engines on a value.
        doc: one or two sentences.
        known: the only values that the engines implement; None: all that ``check`` accepts.
        embedded: the only values that the embedded engine implements, if Detectron2 implements more.
        detectron2: the only values that ``--engine detectron2`` implements, if ``embedded`` is given.
        ours: whether Detectron2 lacks this key.
        rescaled: whether scaling to another batch changes the value, unless set on the command line.
    """

    name: str
    default: Any
    check: Check
    doc: str
    known: tuple[Any, ...] | None = None
    embedded: tuple[Any, ...] | None = None
    detectron2: tuple[Any, ...] | None = None
    ours: bool = False
    rescaled: bool = False

    def implemented(self, engine: str) -> tuple[Any, ...] | None:
        """Return the only values that ``engine`` implements; None for all that pass ``check``."""
        return self.known or (self.embedded if engine == "embedded" else self.detectron2)


# ------------------------------------------------------------ kinds of values

#: Longest path, and longest part of it, in bytes.
_MAX_PATH, _MAX_PART = 2048, 255


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and not re.search(r"[\x00-\x1f\x7f-\x9f]", value)


def _is_path(value: Any) -> bool:
    if not _is_text(value) or "://" in value:
        return _is_text(value)
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in re.split("[/@]", value)]
    return sum(sizes) <= _MAX_PATH and max(sizes) <= _MAX_PART


def _rising(check: Check, least: int, most: int) -> Value:
    return every(items(check, least, most), Value("in increasing order", _is_rising))


def _is_rising(values: Any) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def bit_depth_span(bit_depth: str) -> tuple[float, float] | None:
    """Return LOW and HIGH of an ``INPUT.BIT_DEPTH`` "LOW,HIGH"; None for other text."""
    try:
        low, high = (float(part) for part in bit_depth.strip("()[] ").split(","))
    except ValueError:
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


_TEXT = Value("text of at most 4096 characters without control characters", _is_text)
_NAME = Value("a name without control characters", lambda v: _is_text(v) and v != "")
_PATH = Value(f"a path of at most {_MAX_PATH} bytes, each part of at most {_MAX_PART}", _is_path)
_FOLDER = Value(f"the path of a folder, each part of at most {_MAX_PART} bytes", lambda v: _is_path(v) and v.strip())
_NAME_OR_NUMBER = Value("a name or a number", lambda v: _NAME.holds(v) or (is_number(v) and abs(v) <= 10**6))
_NAMES = items(_NAME, 0, 50_000)
_SETS = items(Value(_PATH.expected, lambda v: _is_path(v) and v != ""), 0, 1000)
_FEATURES = every(items(_NAME, 1, 1000), Value("free of duplicates", lambda v: len(set(v)) == len(v)))
_BIT_DEPTH = Value(
    '"", "full", "percentiles" or "LOW,HIGH" with LOW below HIGH, such as "0,4095"',
    lambda v: isinstance(v, str) and (v in ("", "full", "percentiles") or bit_depth_span(v) is not None),
)
# The upper limits are far beyond any real run; they keep a typo from taking hours or all memory.
_FRACTION, _WEIGHT, _RATE = number(0, 1), number(0, 10**6), number(0, 1000)
_SWITCH = one_of(False, True, "auto")
_FOLD = every(
    items(integer(0, 100), 2, 2),
    Value("(0, 0), or (k, K) with k from 1 to K and K at least 2", lambda v: v[0] <= v[1] and (v[0] > 0) == (v[1] > 1)),
)
_IOUS, _LABELS = _rising(number(0, 1, above=True), 1, 1000), items(integer(-1, 1), 1, 1000)
_FOUR = items(number(0, 10**6, above=True), 4, 4)
_CHANNELS, _LAYERS, _CLASSES, _PROPOSALS = integer(1, 8192), integer(0, 64), integer(0, 100_000), integer(1, 1_000_000)
_PIXELS, _SIZE, _ITERATIONS, _PERIOD = integer(1, 32_768), integer(0, 32_768), integer(1, 10**9), integer(0, 10**9)
_BATCH, _RESOLUTION, _SAMPLING = integer(1, 65_536), integer(1, 256), integer(0, 64)
_CONV_DIM = Value("-1 or a number of channels from 1 to 8192", lambda v: type(v) is int and -1 <= v <= 8192 and v != 0)
_EXPECTED = items(row(_TEXT, _TEXT, FINITE, FINITE), 0, 1000)

#: Norms that both engines build, and those that only Detectron2 has.
NORMS = ("", "GN", "LN", "IN", "BN", "SyncBN", "FrozenBN")
THEIR_NORMS = ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
#: Formulas of Weight Standardization.
WEIGHT_STANDARDIZATIONS = ("jhu", "bit", "timm")
_WS = (
    "Weight Standardization of {}: jhu (the authors' code and mmcv), bit (BiT) or timm (timm's BiT), which differ in "
    "variance and epsilon; needs {}."
)
#: Sections of MODEL with a norm -> description in MODEL.WS.
WS_SECTIONS = {
    "RESNETS": _WS.format("the backbone's convolutions", "MODEL.RESNETS.NORM"),
    "FPN": _WS.format("the lateral and output convolutions", "MODEL.FPN.NORM"),
    "ROI_BOX_HEAD": _WS.format("the box head's convolutions", "MODEL.ROI_BOX_HEAD.NORM"),
    "ROI_MASK_HEAD": _WS.format("the mask head's convolutions", "MODEL.ROI_MASK_HEAD.NORM"),
}


def _unused(section: str, doc: str, **defaults: Any) -> list[Key]:
    """Declare keys of Detectron2 that neither engine implements; only their defaults are accepted."""
    dot = f"{section}." if section else ""
    return [Key(f"{dot}{name}", value, _like(value), doc, known=(value,)) for name, value in defaults.items()]


def _like(default: Any) -> Check:
    """Return a check for values of the type of ``default``."""
    if isinstance(default, (list, tuple)):
        return items(_like(default[0]) if default else _NAME_OR_NUMBER, 0, 1000)
    kinds = {bool: FLAG, int: integer(-(10**6), 10**6), float: number(-(10**6), 10**6), str: _TEXT}
    return kinds[type(default)]


def _theirs(name: str, default: Any, check: Check, doc: str) -> Key:
    """Declare a key that only Detectron2 implements; the embedded engine accepts only the default."""
    return Key(name, default, check, doc, embedded=(default,))


def _norm(name: str, default: str, doc: str) -> Key:
    return Key(name, default, _TEXT, doc, embedded=NORMS, detectron2=(*NORMS, *THEIR_NORMS))


def _box_loss(name: str) -> Key:
    losses = ("smooth_l1", "giou", "diou", "ciou")
    return Key(name, "smooth_l1", _TEXT, "Loss of the box regression.", known=losses)


def _pooler(name: str) -> Key:
    types = ("ROIAlignV2", "ROIAlign", "ROIPool")
    doc = "RoI pooling; ROIAlign is the older variant, shifted by half a pixel."
    return Key(name, "ROIAlignV2", _TEXT, doc, known=types)


# ------------------------------------------------------------ keys

# fmt: off
_KEYS = (
    Key("VERSION", 2, integer(0, 1000), "Version of Detectron2's key names.", known=(2,)),
    Key("OUTPUT_DIR", "./output", _FOLDER, "Folder of checkpoints, metrics.json, TensorBoard events and results."),
    Key("LOGGERS", ("tensorboard",), items(one_of("tensorboard", "wandb", "mlflow", "csv"), 0, 4),
        "Where scalars are written besides metrics.json.", ours=True),
    Key("SEED", -1, integer(-(2**63), 2**63 - 1),
        "Seed of initialization, sampling and augmentation; negative: drawn at the start and printed."),
    Key("CUDNN_BENCHMARK", False, FLAG, "Let cuDNN search algorithms; worthwhile only if image sizes hardly vary."),
    Key("FLOAT32_PRECISION", "", one_of("", "highest", "high", "medium"),
        'Argument of torch.set_float32_matmul_precision; "" leaves torch\'s own.'),
    *_unused("", "Iterations between images drawn during training.", VIS_PERIOD=0),
    *_unused("GLOBAL", "Detectron2's scratch space for experiments.", HACK=1.0),

    Key("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", _NAME, "Kind of detector.",
        embedded=("GeneralizedRCNN",), detectron2=("GeneralizedRCNN", "RetinaNet")),
    Key("MODEL.DEVICE", "auto", _NAME, '"cuda", "cuda:1", "cpu", or "auto": a GPU if there is one.'),
    Key("MODEL.MASK_ON", False, FLAG, "Train and predict masks."),
    Key("MODEL.KEYPOINT_ON", False, FLAG, "Train and predict keypoints.", known=(False,)),
    Key("MODEL.LOAD_PROPOSALS", False, FLAG, "Use precomputed proposals.", known=(False,)),
    Key("MODEL.WEIGHTS", "", _PATH,
        'Path or URI of the initial weights; "": random initialization (MODEL.BACKBONE.FREEZE_AT must be 0).'),
    Key("MODEL.PIXEL_MEAN", [103.530, 116.280, 123.675], items(number(-(10**6), 10**6), 1, 64),
        "Mean of each channel in INPUT.FORMAT order, on the 0-255 scale; belongs to the weights."),
    Key("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], items(number(0, 10**6, above=True), 1, 64),
        "Standard deviation of each channel; belongs to the weights."),
    Key("MODEL.BACKBONE.NAME", "build_resnet_backbone", _NAME,
        "build_resnet_backbone (C4) or build_resnet_fpn_backbone (FPN).",
        embedded=("build_resnet_backbone", "build_resnet_fpn_backbone"),
        detectron2=tuple(f"build_{gn}{name}_backbone" for gn in ("", "gn_") for name in
                         ("resnet", "resnet_fpn", "retinanet_resnet_fpn"))),
    Key("MODEL.BACKBONE.FREEZE_AT", 2, integer(0, 5),
        "Stages with frozen weights: 0 none, 1 stem, 2 stem and res2, ... GN statistics are never frozen."),
    Key("MODEL.BACKBONE.RECOMPUTE", False, FLAG,
        "Gradient checkpointing: keep only the input of each residual block in training, and compute the block again "
        "in the backward pass. The same results to the bit; for backbones with GN, LN, IN, FrozenBN or no norm.",
        ours=True),
    Key("MODEL.FREEZE", (), _NAMES,
        "Parts of the model that do not train, by module name: backbone, backbone.bottom_up (without FPN), "
        "proposal_generator, roi_heads.box_head, roi_heads.mask_head ... Their BN keeps its statistics.", ours=True),
    Key("MODEL.FPN.IN_FEATURES", [], _NAMES, "Backbone features; the same as MODEL.RESNETS.OUT_FEATURES."),
    Key("MODEL.FPN.OUT_CHANNELS", 256, _CHANNELS, "Channels of every level."),
    _norm("MODEL.FPN.NORM", "", "Norm of the lateral and output convolutions."),
    Key("MODEL.FPN.FUSE_TYPE", "sum", one_of("sum", "avg"), "How top-down and lateral paths are joined."),
    Key("MODEL.RESNETS.DEPTH", 50, integer(1, 1000), "Layers of the ResNet.", known=(18, 34, 50, 101, 152)),
    Key("MODEL.RESNETS.OUT_FEATURES", ["res4"], _FEATURES, "[res4] for C4, [res2, res3, res4, res5] for FPN."),
    Key("MODEL.RESNETS.NUM_GROUPS", 1, _CHANNELS,
        "Groups of the 3x3 convolutions: 1 for ResNet, 32 for ResNeXt (not the groups of GN)."),
    Key("MODEL.RESNETS.WIDTH_PER_GROUP", 64, _CHANNELS, "Channels of each such group in res2."),
    _norm("MODEL.RESNETS.NORM", "FrozenBN", "Norm of the backbone; FrozenBN is the paper's BN*."),
    Key("MODEL.RESNETS.STRIDE_IN_1X1", True, FLAG,
        "Stride in the first 1x1 convolution of a bottleneck (MSRA's ResNets) instead of the 3x3 (torch's ResNets, "
        "Detectron's GN and ResNeXt weights)."),
    Key("MODEL.RESNETS.VARIANT", "v1", one_of("v1", "bit", "v2d"),
        "v1: ResNet and ResNeXt; bit: pre-activation ResNet of Big Transfer (RES2_OUT_CHANNELS, WIDTH_PER_GROUP and "
        "STEM_OUT_CHANNELS times its width); v2d: the same with a deep stem and averaging shortcuts.", ours=True),
    Key("MODEL.RESNETS.RES5_DILATION", 1, integer(1, 64), "Dilation of res5 in place of its stride.", known=(1, 2)),
    Key("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, _CHANNELS, "Channels of res2; 64 for ResNet-18 and 34."),
    Key("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, _CHANNELS, "Channels of the stem."),
    _theirs("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4, items(FLAG, 4, 4), "Deformable convolutions in res2-5."),
    _theirs("MODEL.RESNETS.DEFORM_MODULATED", False, FLAG, "Modulated deformable convolutions."),
    _theirs("MODEL.RESNETS.DEFORM_NUM_GROUPS", 1, _CHANNELS, "Groups of the deformable convolutions."),

    Key("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", _NAME, "Source of the proposals.", known=("RPN",)),
    Key("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 0, _SIZE, "Drop proposals with a side of at most this many pixels."),
    Key("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator", _NAME, "Kind of anchors.",
        known=("DefaultAnchorGenerator",)),
    Key("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128, 256, 512]],
        items(items(number(0, 32_768, above=True), 1, 64), 1, 64),
        "Square roots of the anchor areas in pixels, one list per feature map, or one list for all."),
    Key("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0]],
        items(items(number(0, 1000, above=True), 1, 64), 1, 64), "Height / width; lists as in SIZES."),
    Key("MODEL.ANCHOR_GENERATOR.ANGLES", [[-90, 0, 90]], items(items(number(-360, 360), 1, 64), 1, 64),
        "Angles of rotated anchors.", known=([[-90, 0, 90]],)),
    Key("MODEL.ANCHOR_GENERATOR.OFFSET", 0.0, number(0, 1, below=True), "Shift of the first anchor, in strides."),
    Key("MODEL.RPN.HEAD_NAME", "StandardRPNHead", _NAME, "Head of the RPN.", known=("StandardRPNHead",)),
    Key("MODEL.RPN.IN_FEATURES", ["res4"], _FEATURES, "Feature maps of the RPN."),
    Key("MODEL.RPN.BOUNDARY_THRESH", -1, integer(-32_768, 32_768),
        ">= 0: ignore anchors that leave the image by more than this many pixels in training."),
    Key("MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7], _IOUS, "IoUs with the ground truth between which IOU_LABELS change."),
    Key("MODEL.RPN.IOU_LABELS", [0, -1, 1], _LABELS,
        "Label of anchors below the first threshold, between each two, above the last: 0 background, -1 ignored, 1."),
    Key("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256, _PROPOSALS, "Anchors of an image that are sampled for the loss."),
    Key("MODEL.RPN.POSITIVE_FRACTION", 0.5, _FRACTION, "Largest fraction of positives among them."),
    _box_loss("MODEL.RPN.BBOX_REG_LOSS_TYPE"),
    Key("MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 1.0, _WEIGHT, "Weight of the box loss, times LOSS_WEIGHT."),
    Key("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0), _FOUR, "Scale of the targets dx, dy, dw, dh."),
    Key("MODEL.RPN.SMOOTH_L1_BETA", 0.0, _RATE, "Transition of the smooth L1 loss; 0: plain L1."),
    Key("MODEL.RPN.LOSS_WEIGHT", 1.0, _WEIGHT, "Weight of the RPN's losses."),
    Key("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 12000, _PROPOSALS, "Proposals of a feature map kept before NMS, in training."),
    Key("MODEL.RPN.PRE_NMS_TOPK_TEST", 6000, _PROPOSALS, "The same, in inference."),
    Key("MODEL.RPN.POST_NMS_TOPK_TRAIN", 2000, _PROPOSALS, "Proposals of an image kept after NMS, in training."),
    Key("MODEL.RPN.POST_NMS_TOPK_TEST", 1000, _PROPOSALS, "The same, in inference."),
    Key("MODEL.RPN.NMS_THRESH", 0.7, _FRACTION, "IoU above which NMS drops a proposal."),
    Key("MODEL.RPN.CONV_DIMS", [-1], items(_CONV_DIM, 1, 64), "Channels of the head's convolutions; -1: as the input."),

    Key("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", _NAME, "StandardROIHeads or CascadeROIHeads (FPN), Res5ROIHeads (C4).",
        embedded=("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads"),
        detectron2=("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads", "GNRes5ROIHeads")),
    Key("MODEL.ROI_HEADS.NUM_CLASSES", 0, _CLASSES, "Number of classes; 0: that of the training set."),
    Key("MODEL.ROI_HEADS.IN_FEATURES", ["res4"], _FEATURES, "Feature maps of the heads."),
    Key("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.5], _IOUS, "As MODEL.RPN.IOU_THRESHOLDS, of proposals."),
    Key("MODEL.ROI_HEADS.IOU_LABELS", [0, 1], _LABELS, "As MODEL.RPN.IOU_LABELS, of proposals."),
    Key("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, _BATCH, "Proposals of an image that are sampled for the losses."),
    Key("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.25, _FRACTION, "Largest fraction of foreground among them."),
    Key("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05, _FRACTION, "Drop detections with a lower score."),
    Key("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.5, _FRACTION, "IoU above which NMS drops a detection of the same class."),
    Key("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", True, FLAG, "Add the ground truth to the proposals in training."),
    Key("MODEL.ROI_BOX_HEAD.NAME", "", _TEXT,
        "Box head of StandardROIHeads: 4conv1fc is NUM_CONV 4 and NUM_FC 1, 2fc is NUM_CONV 0 and NUM_FC 2.",
        embedded=("", "FastRCNNConvFCHead"), detectron2=("", "FastRCNNConvFCHead", "GNFastRCNNConvFCHead")),
    Key("MODEL.ROI_BOX_HEAD.NUM_CONV", 0, _LAYERS, "3x3 convolutions of the box head."),
    Key("MODEL.ROI_BOX_HEAD.CONV_DIM", 256, _CHANNELS, "Their channels."),
    Key("MODEL.ROI_BOX_HEAD.NUM_FC", 0, _LAYERS, "Fully connected layers after them."),
    Key("MODEL.ROI_BOX_HEAD.FC_DIM", 1024, _BATCH, "Their width."),
    _norm("MODEL.ROI_BOX_HEAD.NORM", "", "Norm of the box head's convolutions."),
    _box_loss("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"),
    Key("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 1.0, _WEIGHT, "Weight of the box loss."),
    Key("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0), _FOUR, "Scale of the targets dx, dy, dw, dh."),
    Key("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.0, _RATE, "Transition of the smooth L1 loss; 0: plain L1."),
    Key("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", (), items(row(_NAME, number(0, 10**6, above=True)), 0, 100_000),
        "Weights in the classification loss, a weighted mean: rows [class, weight], such as [['ring', 2.0], "
        "['background', 0.5]]; classes that are not named have 1.", ours=True),
    Key("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14, _RESOLUTION, "Side of the pooled features."),
    Key("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 0, _SAMPLING, "Samples along a side of a bin; 0: by its size."),
    _pooler("MODEL.ROI_BOX_HEAD.POOLER_TYPE"),
    Key("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False, FLAG, "One box regression for all classes."),
    _theirs("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", False, FLAG, "Train the mask head on predicted boxes."),
    *_unused("MODEL.ROI_BOX_HEAD", "Federated loss.", USE_FED_LOSS=False),
    _theirs("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", False, FLAG, "Sigmoid in place of softmax classification."),
    *_unused("MODEL.ROI_BOX_HEAD", "Of the federated loss.", FED_LOSS_FREQ_WEIGHT_POWER=0.5, FED_LOSS_NUM_CLASSES=50),
    Key("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", _NAME, "Mask head.",
        embedded=("MaskRCNNConvUpsampleHead",), detectron2=("MaskRCNNConvUpsampleHead", "GNMaskRCNNConvUpsampleHead")),
    Key("MODEL.ROI_MASK_HEAD.NUM_CONV", 0, _LAYERS, "3x3 convolutions of the mask head."),
    Key("MODEL.ROI_MASK_HEAD.CONV_DIM", 256, _CHANNELS, "Their channels, and those of the deconvolution."),
    _norm("MODEL.ROI_MASK_HEAD.NORM", "", "Norm of the mask head's convolutions."),
    Key("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, _RESOLUTION, "Side of the pooled features."),
    Key("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 0, _SAMPLING, "As in MODEL.ROI_BOX_HEAD."),
    _pooler("MODEL.ROI_MASK_HEAD.POOLER_TYPE"),
    Key("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False, FLAG, "One mask for all classes."),

    Key("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)), items(_FOUR, 1, 64),
        "As in MODEL.ROI_BOX_HEAD, for each stage of CascadeROIHeads."),
    Key("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6, 0.7), items(number(0, 1, above=True), 1, 64),
        "IoU from which a box is foreground in each stage; the first one is MODEL.ROI_HEADS.IOU_THRESHOLDS."),
    *_unused("MODEL.ROI_KEYPOINT_HEAD", "Keypoint head.", NAME="KRCNNConvDeconvUpsampleHead", POOLER_RESOLUTION=14,
             POOLER_SAMPLING_RATIO=0, CONV_DIMS=(512,) * 8, NUM_KEYPOINTS=17, MIN_KEYPOINTS_PER_IMAGE=1,
             NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS=True, LOSS_WEIGHT=1.0, POOLER_TYPE="ROIAlignV2"),
    *_unused("MODEL.SEM_SEG_HEAD", "Semantic segmentation head.", NAME="SemSegFPNHead",
             IN_FEATURES=["p2", "p3", "p4", "p5"], IGNORE_VALUE=255, NUM_CLASSES=54, CONVS_DIM=128, COMMON_STRIDE=4,
             NORM="GN", LOSS_WEIGHT=1.0),
    *_unused("MODEL.PANOPTIC_FPN", "Panoptic segmentation.", INSTANCE_LOSS_WEIGHT=1.0),
    *_unused("MODEL.PANOPTIC_FPN.COMBINE", "Panoptic segmentation.", ENABLED=True, OVERLAP_THRESH=0.5,
             STUFF_AREA_LIMIT=4096, INSTANCES_CONFIDENCE_THRESH=0.5),
    _theirs("MODEL.RETINANET.NUM_CLASSES", 80, _CLASSES, "Number of classes; 0 and 80: that of the training set."),
    _theirs("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"], _FEATURES, "Feature maps of the head."),
    _theirs("MODEL.RETINANET.NUM_CONVS", 4, _LAYERS, "Convolutions of the head."),
    _theirs("MODEL.RETINANET.IOU_THRESHOLDS", [0.4, 0.5], _IOUS, "As MODEL.RPN.IOU_THRESHOLDS."),
    _theirs("MODEL.RETINANET.IOU_LABELS", [0, -1, 1], _LABELS, "As MODEL.RPN.IOU_LABELS."),
    _theirs("MODEL.RETINANET.PRIOR_PROB", 0.01, number(0, 1, above=True, below=True),
            "Foreground probability that the head starts with."),
    _theirs("MODEL.RETINANET.SCORE_THRESH_TEST", 0.05, _FRACTION, "Drop detections with a lower score."),
    _theirs("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 1000, _PROPOSALS, "Detections of a feature map kept before NMS."),
    _theirs("MODEL.RETINANET.NMS_THRESH_TEST", 0.5, _FRACTION, "IoU above which NMS drops a detection."),
    _theirs("MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0), _FOUR, "Scale of the targets dx, dy, dw, dh."),
    _theirs("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 2.0, _RATE, "Gamma of the focal loss."),
    _theirs("MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.25, number(-1, 1), "Alpha of the focal loss; negative: none."),
    _theirs("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.1, _RATE, "Transition of the smooth L1 loss; 0: plain L1."),
    _theirs("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1", _NAME, "Loss of the box regression."),
    _theirs("MODEL.RETINANET.NORM", "", _TEXT, "Norm of the head."),

    Key("MODEL.CHANNELS_LAST", False, _SWITCH,
        "Keep weights and activations in channels_last: faster on CPUs, equal to Detectron2 up to rounding only; "
        '"auto": where SOLVER.AMP.ENABLED "auto" takes bf16.', ours=True),
    Key("MODEL.GN.NUM_GROUPS", 32, _CHANNELS, "Groups of every GN layer (the paper's default, Table 3).", ours=True),
    Key("MODEL.GN.CHANNELS_PER_GROUP", 0, integer(0, 8192),
        "> 0: channels of each group, in place of NUM_GROUPS (the paper's other division).", ours=True),
    Key("MODEL.GN.EPS", 1e-5, number(0, 1, above=True), "Added to the variance.", ours=True),
    Key("MODEL.GN.FUSED", "auto", one_of("auto", "on", "off"),
        'Kernels that fuse GN, add and ReLU, and on a CPU RoIAlign: "on" where they can run (a GPU with Triton; a CPU '
        'with a C++ compiler, for channels_last maps), "off" never, "auto" where they were measured to be faster: on '
        "CPUs (no GPU so far). Quote on and off in YAML: the bare words are booleans.",
        ours=True),
    Key("MODEL.GN.RECOMPUTE", False, FLAG,
        "Keep one activation less for each GN + ReLU in training, and recompute it in the backward pass.", ours=True),
    *(Key(f"MODEL.WS.{section}", "", one_of("", *WEIGHT_STANDARDIZATIONS), doc, ours=True)
      for section, doc in WS_SECTIONS.items()),
    Key("MODEL.CLASS_NAMES", (), _NAMES,
        "Filled at run time from the data set, stored in checkpoints, used by predict.", ours=True),

    Key("INPUT.MIN_SIZE_TRAIN", (800,), items(_PIXELS, 1, 1000),
        "Shorter side in training, in pixels: one of these, or within [min, max] if MIN_SIZE_TRAIN_SAMPLING is range."),
    Key("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", one_of("choice", "range"), "How MIN_SIZE_TRAIN is sampled."),
    Key("INPUT.MAX_SIZE_TRAIN", 1333, _PIXELS, "Upper bound of the longer side in training."),
    Key("INPUT.MIN_SIZE_TEST", 800, _SIZE, "Shorter side in inference; 0: images are not resized."),
    Key("INPUT.MAX_SIZE_TEST", 1333, _PIXELS, "Upper bound of the longer side in inference."),
    Key("INPUT.RANDOM_FLIP", "horizontal", one_of("horizontal", "vertical", "none"), "Random flips in training."),
    Key("INPUT.CROP.ENABLED", False, FLAG, "Random crops in training."),
    Key("INPUT.CROP.TYPE", "relative_range", one_of("relative_range", "relative", "absolute", "absolute_range"),
        "Whether SIZE is a fraction of the image or pixels, and fixed or the smallest (range)."),
    Key("INPUT.CROP.SIZE", [0.9, 0.9], items(number(0, 32_768, above=True), 2, 2), "Height and width of the crop."),
    Key("INPUT.LSJ.ENABLED", False, FLAG,
        "Large-scale jitter in training, in place of CROP and MIN_SIZE_TRAIN: scale, then cut or pad to a square.",
        ours=True),
    Key("INPUT.LSJ.SIZE", 1024, _PIXELS, "Side of that square in pixels.", ours=True),
    Key("INPUT.LSJ.SCALE", (0.1, 2.0), _rising(number(0, 10, above=True), 2, 2),
        "Smallest and largest scale; at 1 the longer side of the image fills the square.", ours=True),
    Key("INPUT.ROTATION", 0.0, number(0, 180), "Rotate training images by up to this many degrees.", ours=True),
    Key("INPUT.COLOR_JITTER", (0.0, 0.0, 0.0, 0.0),
        every(items(_FRACTION, 4, 4), Value("with a hue of at most 0.5", lambda v: v[3] <= 0.5)),
        "Strength of the random brightness, contrast, saturation and hue, as in torchvision's ColorJitter.", ours=True),
    Key("INPUT.COPY_PASTE", 0.0, _FRACTION,
        "Probability that objects of another training image are pasted over an image; needs MODEL.MASK_ON.", ours=True),
    Key("INPUT.FORMAT", "BGR", _NAME,
        "Channels of the network's input: BGR, RGB, or L: one gray channel, with one number each in MODEL.PIXEL_MEAN "
        "and PIXEL_STD. Belongs to the weights.", known=("BGR", "RGB", "L")),
    Key("INPUT.MASK_FORMAT", "polygon", one_of("polygon", "bitmask"), "Ground truth as polygons, or all as bitmaps."),
    Key("INPUT.BIT_DEPTH", "", _BIT_DEPTH,
        'How gray images of 16 or 32 bits or floats become 8 bits. "": they are refused; "LOW,HIGH": LOW becomes black '
        'and HIGH white; "full": 0 to 65535; "percentiles": of each image, the 0.5th is black and the 99.5th white.',
        ours=True),
    Key("INPUT.MAX_PIXELS", 178_956_970, integer(1, 10**10),
        "Larger images are refused, because a small file can unpack to any size; Pillow's own limit.", ours=True),

    Key("DATASETS.TRAIN", (), _SETS, "Names (such as coco_2017_train) or annotations.json@folder/of/images."),
    Key("DATASETS.TEST", (), _SETS, "The sets to evaluate on."),
    *_unused("DATASETS", "Precomputed proposals.", PROPOSAL_FILES_TRAIN=(), PRECOMPUTED_PROPOSAL_TOPK_TRAIN=2000,
             PROPOSAL_FILES_TEST=(), PRECOMPUTED_PROPOSAL_TOPK_TEST=1000),
    Key("DATASETS.TRAIN_JSON", "", _PATH, "COCO annotations of your own; replace DATASETS.TRAIN.", ours=True),
    Key("DATASETS.TRAIN_IMAGES", "", _PATH, "Folder of their images.", ours=True),
    Key("DATASETS.VAL_JSON", "", _PATH, "COCO annotations of your own; replace DATASETS.TEST.", ours=True),
    Key("DATASETS.VAL_IMAGES", "", _PATH, "Folder of their images.", ours=True),
    Key("DATASETS.VAL_FRACTION", 0.0, number(0, 1, below=True),
        "> 0: hold out this part of DATASETS.TRAIN_JSON for validation, by image and class; see OUTPUT_DIR/split.",
        ours=True),
    Key("DATASETS.VAL_FOLD", (0, 0), _FOLD,
        "(k, K): divide DATASETS.TRAIN_JSON into K folds by image and class, hold out the k-th for validation and "
        "train on the others; the folds depend on the json alone. gn-det compare --folds K runs all of them.",
        ours=True),
    Key("DATALOADER.NUM_WORKERS", 4, integer(0, 1024), "Worker processes of each GPU; at most the number of cores."),
    Key("DATALOADER.ASPECT_RATIO_GROUPING", True, FLAG, "Images of a batch are all wide or all tall: less padding."),
    Key("DATALOADER.SAMPLER_TRAIN", "TrainingSampler", _NAME,
        "RepeatFactorTrainingSampler shows rare categories more often, by REPEAT_THRESHOLD.",
        known=("TrainingSampler", "RepeatFactorTrainingSampler")),
    Key("DATALOADER.REPEAT_THRESHOLD", 0.0, _FRACTION, "Categories in a smaller fraction of the images are repeated."),
    Key("DATALOADER.REPEAT_SQRT", True, FLAG, "Repeat by the square root of the ratio."),
    Key("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True, FLAG, "Drop training images without objects."),
    Key("DATALOADER.MAX_BAD", 10, _PERIOD,
        "Broken images and annotations that are listed and dropped; with more the run refuses to start.", ours=True),

    Key("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", _NAME, "Learning rate schedule.",
        known=("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")),
    Key("SOLVER.MAX_ITER", 40000, _ITERATIONS, "Iterations of the run.", rescaled=True),
    Key("SOLVER.BASE_LR", 0.001, number(0, 1000, above=True), "Learning rate after the warm-up.", rescaled=True),
    Key("SOLVER.BASE_LR_END", 0.0, _RATE, "Final learning rate of WarmupCosineLR."),
    Key("SOLVER.OPTIMIZER", "SGD", one_of("SGD", "ADAMW"),
        "Optimizer. ADAMW decouples the weight decay from the gradient; it takes a BASE_LR of about 0.0001 and a "
        "WEIGHT_DECAY of about 0.05.", ours=True),
    Key("SOLVER.BETAS", (0.9, 0.999), items(number(0, 1, below=True), 2, 2),
        "Of AdamW: decay of the averages of gradient and squared gradient.", ours=True),
    Key("SOLVER.BACKBONE_LR_FACTOR", 1.0, number(0, 1000, above=True),
        "Learning rate of the backbone (FPN included) relative to BASE_LR.", ours=True),
    Key("SOLVER.MOMENTUM", 0.9, number(0, 1, below=True), "Momentum of SGD."),
    Key("SOLVER.NESTEROV", False, FLAG, "Nesterov momentum of SGD."),
    Key("SOLVER.WEIGHT_DECAY", 0.0001, _RATE, "Weight decay."),
    Key("SOLVER.WEIGHT_DECAY_NORM", 0.0, _RATE, "Weight decay of gamma and beta; 0 is the paper's fine-tuning recipe."),
    Key("SOLVER.GAMMA", 0.1, number(0, 10), "Factor of the learning rate at each of STEPS."),
    Key("SOLVER.STEPS", (30000,), _rising(_ITERATIONS, 0, 1000), "Iterations at which the rate drops.", rescaled=True),
    Key("SOLVER.NUM_DECAYS", 3, integer(0, 1000), "Of WarmupStepWithFixedGammaLR."),
    Key("SOLVER.WARMUP_FACTOR", 0.001, number(0, 10), "The learning rate starts at WARMUP_FACTOR * BASE_LR."),
    Key("SOLVER.WARMUP_ITERS", 1000, _PERIOD, "Iterations of the warm-up.", rescaled=True),
    Key("SOLVER.WARMUP_METHOD", "linear", one_of("linear", "constant"), "Shape of the warm-up."),
    Key("SOLVER.RESCALE_INTERVAL", False, FLAG, "Rescale the warm-up's end so that it joins the schedule."),
    Key("SOLVER.CHECKPOINT_PERIOD", 5000, _ITERATIONS, "Iterations between checkpoints.", rescaled=True),
    Key("SOLVER.IMS_PER_BATCH", 16, _BATCH, "Images of one optimizer step over all GPUs.", rescaled=True),
    Key("SOLVER.REFERENCE_WORLD_SIZE", 0, integer(0, 65_536),
        "> 0: GPUs that the schedule was written for; another number scales batch, learning rate and iterations."),
    Key("SOLVER.BIAS_LR_FACTOR", 1.0, _RATE, "Learning rate of biases relative to BASE_LR."),
    Key("SOLVER.WEIGHT_DECAY_BIAS", None, optional(_RATE), "Weight decay of biases; None: WEIGHT_DECAY."),
    Key("SOLVER.CLIP_GRADIENTS.ENABLED", False, FLAG, "Clip gradients."),
    Key("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", one_of("value", "norm", "full_model"),
        "Each value, the norm of each parameter, or one norm over all parameters."),
    Key("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0, number(0, 10**9, above=True), "Bound of the values or norms."),
    Key("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 2.0, number(0, 1000, above=True), "Order of the norm."),
    Key("SOLVER.AMP.ENABLED", False, _SWITCH,
        'Automatic mixed precision; "auto": bf16 on CPUs that compute in it (amx_bf16, avx512_bf16).'),
    Key("SOLVER.AMP.DTYPE", "bf16", one_of("bf16", "fp16"), "Type of autocast; fp16 scales the loss.", ours=True),
    Key("SOLVER.ACCUMULATE", 1, _BATCH, "Micro-batches of an optimizer step; IMS_PER_BATCH counts all.", ours=True),
    Key("SOLVER.AUTO_BATCH", False, FLAG,
        "On a GPU: take IMS_PER_BATCH as it is written, put as many images on the GPU at a time as its memory holds, "
        "and set ACCUMULATE for the rest.", detectron2=(False,), ours=True),
    Key("SOLVER.EPOCHS", 0.0, _WEIGHT,
        "> 0: MAX_ITER becomes this many passes over the training set, other iteration counts keep their proportion.",
        ours=True),
    Key("SOLVER.AUTO_EPOCHS", False, FLAG,
        "Choose a short length for DATASETS.TRAIN_JSON where MAX_ITER means more than 100 epochs; shipped configs do "
        "on the command line, unless EPOCHS or MAX_ITER is given.", ours=True),
    Key("SOLVER.REFERENCE_BATCH", 0, integer(0, 65_536),
        "> 0: the batch that BASE_LR and the schedule were written for; another IMS_PER_BATCH scales the learning rate "
        "linearly and iterations inversely.", ours=True),
    Key("SOLVER.NO_RESCALE", (), _NAMES,
        "Keys that this scaling takes literally; overrides on the command line are added.", ours=True),
    Key("SOLVER.EMA.ENABLED", False, FLAG,
        "Keep a moving average of the weights; it is what is evaluated and saved as the model.", ours=True),
    Key("SOLVER.EMA.DECAY", 0.999, number(0, 1, below=True), "What stays of the average at each step.", ours=True),
    Key("SOLVER.MAX_HOURS", 0.0, number(0, 100_000),
        "> 0: evaluate, save and stop within this many hours of this start; --resume continues.", ours=True),
    Key("SOLVER.CHECKPOINT_KEEP", 3, integer(1, 1_000_000),
        "Periodic checkpoints that stay on disk, besides the best and the final one.", ours=True),

    Key("TEST.AMP", False, _SWITCH, "Mixed precision in evaluation and prediction, too.", ours=True),
    Key("TEST.EXPECTED_RESULTS", [], _EXPECTED,
        'Rows [task, metric, value, tolerance], such as ["bbox", "AP", 38.5, 0.2]; a final result beyond its tolerance '
        "fails the run."),
    Key("TEST.EVAL_PERIOD", 0, _PERIOD, "Iterations between evaluations; 0: only at the end.", rescaled=True),
    *_unused("TEST", "Of keypoint evaluation.", KEYPOINT_OKS_SIGMAS=[]),
    Key("TEST.DETECTIONS_PER_IMAGE", 100, integer(1, 100_000), "Detections of an image that are kept."),
    Key("TEST.AUG.ENABLED", False, FLAG,
        "Detect in several sizes of an image and join the results; takes many times as long."),
    Key("TEST.AUG.MIN_SIZES", (400, 500, 600, 700, 800, 900, 1000, 1100, 1200), items(_PIXELS, 1, 100),
        "Shorter sides of these sizes."),
    Key("TEST.AUG.MAX_SIZE", 4000, _PIXELS, "Upper bound of their longer sides."),
    Key("TEST.AUG.FLIP", True, FLAG, "Flip each of them, too."),
    Key("TEST.PRECISE_BN.ENABLED", False, FLAG,
        "Recompute the running statistics of BN and SyncBN before each evaluation and at the end.",
        detectron2=(False,)),
    Key("TEST.PRECISE_BN.NUM_ITER", 200, integer(1, 10**6), "Training batches for that."),
    Key("TEST.MAX_DETS", 100, integer(1, 100_000),
        "Detections of a class that count in an image (COCOeval's maxDets); raise it with DETECTIONS_PER_IMAGE if "
        "images have more objects.", ours=True),
    Key("TEST.PATIENCE", 0, integer(0, 1_000_000),
        "Stop after this many evaluations without a better TEST.BEST_METRIC; 0: never.", ours=True),
    Key("TEST.BEST_METRIC", "segm/AP", _NAME,
        'Chooses model_best.pth; without a mask head "segm/AP" means "bbox/AP".', ours=True),
)
# fmt: on

#: Name -> key, in the order of a config.
KEYS = {key.name: key for key in _KEYS}
