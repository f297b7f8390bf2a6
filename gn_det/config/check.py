"""What each engine implements: everything else is refused by name, never ignored."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode as CN

from gn_det.data.inputs import bit_depth_range
from gn_det.errors import ConfigError
from gn_det.text import shown

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


class Range(NamedTuple):
    """Numbers that a key may have: the number itself, or every number of a list.

    Attributes:
        low, high: the ends, which belong to it.
        above: ``low`` does not belong to it.
        below: ``high`` does not belong to it.
        whole: no fractions in the list (a key with one number has the type of its default).
        most: numbers of a list.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False
    most: int = 1000

    def holds(self, number: float) -> bool:
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"between {self.low} and {self.high}"
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high}"


_FRACTION = Range(0, 1)
_WEIGHT = Range(0, 10**6)
_BOX_WEIGHTS = Range(0, 10**6, above=True)
_CHANNELS = Range(1, 8192)
_LAYERS = Range(0, 64)
_CLASSES = Range(0, 100_000)
_PROPOSALS = Range(1, 1_000_000)
_PIXELS = Range(1, 32_768, whole=True)
_ITERATIONS = Range(1, 10**9, whole=True)
_PERIOD = Range(0, 10**9)
_RATE = Range(0, 1000)
_LABELS = Range(-1, 1, whole=True)

#: Of numbers that are not in :data:`RANGES`.
_ANY = Range(-(10**9), 10**9)

#: Key -> its numbers. The upper ends are far beyond any real run; they keep a slip of the keyboard from taking hours or
#: all memory before it is noticed.
RANGES: dict[str, Range] = {
    "SEED": Range(-(2**63), 2**63, below=True),
    "MODEL.PIXEL_MEAN": Range(-(10**6), 10**6),
    "MODEL.PIXEL_STD": Range(0, 10**6, above=True),
    "MODEL.BACKBONE.FREEZE_AT": Range(0, 5),
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "MODEL.GN.NUM_GROUPS": _CHANNELS,
    "MODEL.GN.CHANNELS_PER_GROUP": Range(0, 8192),
    "MODEL.GN.EPS": Range(0, 1, above=True),
    "MODEL.RESNETS.NUM_GROUPS": _CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _CHANNELS,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": Range(0, 32_768),
    "MODEL.ANCHOR_GENERATOR.SIZES": Range(0, 32_768, above=True, most=64),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": Range(0, 1000, above=True, most=64),
    "MODEL.ANCHOR_GENERATOR.ANGLES": Range(-360, 360, most=64),
    "MODEL.ANCHOR_GENERATOR.OFFSET": Range(0, 1, below=True),
    "MODEL.RPN.BOUNDARY_THRESH": Range(-32_768, 32_768),
    "MODEL.RPN.IOU_THRESHOLDS": _FRACTION,
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _PROPOSALS,
    "MODEL.RPN.POSITIVE_FRACTION": _FRACTION,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.SMOOTH_L1_BETA": _RATE,
    "MODEL.RPN.LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _PROPOSALS,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _PROPOSALS,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _PROPOSALS,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _PROPOSALS,
    "MODEL.RPN.NMS_THRESH": _FRACTION,
    "MODEL.RPN.CONV_DIMS": Range(-1, 8192, whole=True, most=64),
    "MODEL.ROI_HEADS.NUM_CLASSES": _CLASSES,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _FRACTION,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": Range(1, 65_536),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _FRACTION,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _FRACTION,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _LAYERS,
    "MODEL.ROI_BOX_HEAD.FC_DIM": Range(1, 65_536),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _RATE,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": Range(1, 256),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": Range(0, 64),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": _RATE,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": _CLASSES,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": Range(1, 256),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": Range(0, 64),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _FRACTION,
    "MODEL.RETINANET.NUM_CLASSES": _CLASSES,
    "MODEL.RETINANET.NUM_CONVS": _LAYERS,
    "MODEL.RETINANET.IOU_THRESHOLDS": _FRACTION,
    "MODEL.RETINANET.IOU_LABELS": _LABELS,
    "MODEL.RETINANET.PRIOR_PROB": Range(0, 1, above=True, below=True),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _PROPOSALS,
    "MODEL.RETINANET.NMS_THRESH_TEST": _FRACTION,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _RATE,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": Range(-1, 1),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _RATE,
    "INPUT.MIN_SIZE_TRAIN": _PIXELS,
    "INPUT.MAX_SIZE_TRAIN": _PIXELS,
    "INPUT.MIN_SIZE_TEST": Range(0, 32_768),
    "INPUT.MAX_SIZE_TEST": _PIXELS,
    "INPUT.CROP.SIZE": Range(0, 32_768, above=True),
    "INPUT.MAX_PIXELS": Range(1, 10**10),
    "DATALOADER.NUM_WORKERS": Range(0, 1024),
    "DATALOADER.REPEAT_THRESHOLD": _FRACTION,
    "DATALOADER.MAX_BAD": Range(0, 10**9),
    "SOLVER.MAX_ITER": _ITERATIONS,
    "SOLVER.BASE_LR": Range(0, 1000, above=True),
    "SOLVER.BASE_LR_END": _RATE,
    "SOLVER.MOMENTUM": Range(0, 1, below=True),
    "SOLVER.WEIGHT_DECAY": _RATE,
    "SOLVER.WEIGHT_DECAY_NORM": _RATE,
    "SOLVER.WEIGHT_DECAY_BIAS": _RATE,
    "SOLVER.BIAS_LR_FACTOR": _RATE,
    "SOLVER.GAMMA": Range(0, 10),
    "SOLVER.STEPS": _ITERATIONS,
    "SOLVER.NUM_DECAYS": Range(0, 1000),
    "SOLVER.WARMUP_FACTOR": Range(0, 10),
    "SOLVER.WARMUP_ITERS": _PERIOD,
    "SOLVER.CHECKPOINT_PERIOD": _ITERATIONS,
    "SOLVER.CHECKPOINT_KEEP": Range(1, 1_000_000),
    "SOLVER.IMS_PER_BATCH": Range(1, 65_536),
    "SOLVER.ACCUMULATE": Range(1, 65_536),
    "SOLVER.EPOCHS": _WEIGHT,
    "SOLVER.EMA.DECAY": Range(0, 1, below=True),
    "SOLVER.MAX_HOURS": Range(0, 100_000),
    "SOLVER.REFERENCE_BATCH": Range(0, 65_536),
    "SOLVER.REFERENCE_WORLD_SIZE": Range(0, 65_536),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Range(0, 10**9, above=True),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Range(0, 1000, above=True),
    "TEST.EVAL_PERIOD": _PERIOD,
    "TEST.PATIENCE": Range(0, 1_000_000),
    "TEST.DETECTIONS_PER_IMAGE": Range(1, 100_000),
    "TEST.MAX_DETS": Range(1, 100_000),
}

#: Sections whose keys change nothing here: both engines refuse them, or their only value is checked by name.
_NO_RANGES = (
    "VERSION",
    "VIS_PERIOD",
    "GLOBAL",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.RES5_DILATION",
    "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.SEM_SEG_HEAD",
    "MODEL.PANOPTIC_FPN",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK",
    "TEST.AUG",
    "TEST.PRECISE_BN",
)

#: Characters of a text; of a path and of its parts between slashes (bytes).
_MAX_TEXT, _MAX_PATH, _MAX_PART = 4096, 2048, 255
_MAX_NAMES = 50_000


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be a name or path: no control characters, not endless."""
    return isinstance(value, str) and len(value) <= _MAX_TEXT and not re.search(r"[\x00-\x1f\x7f-\x9f]", value)


def _is_path(value: Any) -> bool:
    if not _is_text(value) or "://" in value:
        return _is_text(value)
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in re.split("[/@]", value)]
    return sum(sizes) <= _MAX_PATH and max(sizes) <= _MAX_PART


def _is_row(row: Any) -> bool:
    good = isinstance(row, (list, tuple)) and len(row) == 4 and all(_is_text(name) for name in row[:2])
    return good and all(isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < 1e9 for n in row[2:])


_INCREASING = (
    "increasing numbers > 0",
    lambda v: len(v) > 0 and all(a < b for a, b in itertools.pairwise((0, *v))),
)
_NAMES = ("a list of names", lambda v: len(v) <= _MAX_NAMES and all(_is_text(name) and name for name in v))
_FEATURES = ("names of feature maps, each once", lambda v: len(v) > 0 and _NAMES[1](v) and len(set(v)) == len(v))
_SETS = ("a list of names", lambda v: len(v) <= 1000 and all(_is_path(name) and name for name in v))
_FOUR = ("4 numbers > 0", lambda v: len(v) == 4)
_PLACE = (f"a path of at most {_MAX_PATH} characters, each part of at most {_MAX_PART}", _is_path)

#: Keys whose values must hold together in other ways.
_SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "OUTPUT_DIR": (
        f"the path of a folder, not empty, each part of at most {_MAX_PART} characters",
        lambda v: _is_path(v) and v.strip(),
    ),
    "MODEL.WEIGHTS": _PLACE,
    "MODEL.CLASS_NAMES": _NAMES,
    "MODEL.FPN.IN_FEATURES": _NAMES,
    "MODEL.RESNETS.OUT_FEATURES": _FEATURES,
    "MODEL.RPN.IN_FEATURES": _FEATURES,
    "MODEL.ROI_HEADS.IN_FEATURES": _FEATURES,
    "MODEL.RETINANET.IN_FEATURES": _FEATURES,
    "MODEL.RPN.IOU_THRESHOLDS": _INCREASING,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _FOUR,
    "MODEL.RPN.CONV_DIMS": ("numbers of channels, or -1", lambda v: len(v) > 0 and 0 not in v),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _INCREASING,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _FOUR,
    "MODEL.RETINANET.IOU_THRESHOLDS": _INCREASING,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _FOUR,
    "MODEL.ANCHOR_GENERATOR.SIZES": ("lists of sizes", lambda v: len(v) > 0 and all(len(sizes) > 0 for sizes in v)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ("lists of ratios", lambda v: len(v) > 0 and all(len(r) > 0 for r in v)),
    "INPUT.MIN_SIZE_TRAIN": ("positive sizes", lambda v: len(v) > 0),
    "INPUT.CROP.SIZE": ("2 numbers, [height, width]", lambda v: len(v) == 2),
    "DATASETS.TRAIN": _SETS,
    "DATASETS.TEST": _SETS,
    "DATASETS.TRAIN_JSON": _PLACE,
    "DATASETS.TRAIN_IMAGES": _PLACE,
    "DATASETS.VAL_JSON": _PLACE,
    "DATASETS.VAL_IMAGES": _PLACE,
    "SOLVER.NO_RESCALE": _NAMES,
    "SOLVER.STEPS": ("increasing iterations", lambda v: list(v) == sorted(set(v))),
    "TEST.EXPECTED_RESULTS": (
        "a list of [task, metric, value, tolerance]",
        lambda v: len(v) <= 1000 and all(_is_row(row) for row in v),
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
    check_ranges(cfg)
    bit_depth_range(cfg.INPUT.BIT_DEPTH)
    _check_model(cfg)
    _check_data(cfg)


def check_ranges(cfg: CN, source: str = "") -> None:
    """Refuse numbers, names and lists that no run can have, whatever the engine.

    Args:
        cfg: merged from files and command line, or stored with weights.
        source: stands before the key in messages.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for key, value in _leaves(cfg):
        if isinstance(value, str):
            if not _is_text(value):
                problem = f"text without control characters, of at most {_MAX_TEXT} characters"
                raise ConfigError(f"{source}{key} = {shown(value)} must be {problem}")
            continue
        allowed = RANGES.get(key, _ANY)
        for count, number in enumerate(_numbers(value), 1):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{source}{key} = {shown(value)} must be a finite number")
            if not allowed.holds(number):
                raise ConfigError(f"{source}{key} = {shown(value)} must be {allowed}")
            if allowed.whole and isinstance(number, float):
                raise ConfigError(f"{source}{key} = {shown(value)} must be whole numbers")
            if count > allowed.most:
                raise ConfigError(f"{source}{key} = {shown(value)} must hold at most {allowed.most} numbers")
    for key, (what, holds) in _SHAPES.items():
        value = _get(cfg, key)
        if not holds(value):
            raise ConfigError(f"{source}{key} = {shown(value)} must be {what}")
    width = cfg.MODEL.RESNETS.NUM_GROUPS * cfg.MODEL.RESNETS.WIDTH_PER_GROUP
    if width > _CHANNELS.high:
        raise ConfigError(
            f"{source}MODEL.RESNETS.NUM_GROUPS x MODEL.RESNETS.WIDTH_PER_GROUP is {width}; at most "
            f"{_CHANNELS.high:.0f} channels are possible"
        )
    weights = _least_weights(cfg)
    if weights > _MAX_WEIGHTS:
        raise ConfigError(
            f"{source}MODEL describes about {weights} weights, and at most {_MAX_WEIGHTS} are possible; make channels, "
            "classes or MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION smaller"
        )


#: Weights that a model may have; the largest published ones have 0.2 billion.
_MAX_WEIGHTS = 2**30


def _least_weights(cfg: CN) -> int:
    """Weights of the large layers, roughly."""
    model, resnets = cfg.MODEL, cfg.MODEL.RESNETS
    fpn, classes = "_fpn_" in model.BACKBONE.NAME, max(model.ROI_HEADS.NUM_CLASSES, model.RETINANET.NUM_CLASSES)
    width, out, weights = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP, resnets.RES2_OUT_CHANNELS, 0
    for stage, blocks in enumerate((3, 4, 6, 3)):
        wide = width << stage
        weights += blocks * (2 * wide * (out << stage) + 9 * wide * wide // resnets.NUM_GROUPS)
    channels = model.FPN.OUT_CHANNELS if fpn else 4 * out
    weights += 9 * channels * channels + (15 * out * channels if fpn else 0)
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    weights += 9 * (box.NUM_CONV * box.CONV_DIM**2 + mask.NUM_CONV * mask.CONV_DIM**2)
    if fpn:
        flat = (box.CONV_DIM if box.NUM_CONV else channels) * box.POOLER_RESOLUTION**2
        weights += flat * box.FC_DIM + (box.NUM_FC - 1) * box.FC_DIM**2 if box.NUM_FC else 0
        weights += (box.FC_DIM if box.NUM_FC else flat) * 5 * classes
    else:
        weights += 8 * out * 5 * classes
    return int(weights)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _is_among(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    return allowed is None or any(_same(value, a) for a in allowed)


def _refused(key: str, value: Any, on_detectron2: bool, known: str, on_the_other: bool) -> ConfigError:
    engine = "detectron2" if on_detectron2 else "embedded"
    text = f"{key} = {shown(value)} is not implemented by the {engine} engine{known}"
    return ConfigError(f"{text}; --engine detectron2 runs it" if on_the_other and not on_detectron2 else text)


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
                    f"MODEL.{key}.IN_FEATURES: {shown(feature)} is not made by MODEL.BACKBONE.NAME "
                    f"{model.BACKBONE.NAME}; it makes {', '.join(names)}"
                )
    if fpn and list(model.FPN.IN_FEATURES) != list(resnets.OUT_FEATURES):
        raise ConfigError("MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES must name the same features")
    if fpn and "Res5ROIHeads" in model.ROI_HEADS.NAME and model.META_ARCHITECTURE == "GeneralizedRCNN":
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} does not go with MODEL.BACKBONE.NAME {model.BACKBONE.NAME}; "
            "FPN takes StandardROIHeads"
        )
    for key in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = model[key].IOU_THRESHOLDS, model[key].IOU_LABELS
        if len(labels) != len(thresholds) + 1:
            raise ConfigError(
                f"MODEL.{key}.IOU_LABELS {shown(labels)} must have one more entry than MODEL.{key}.IOU_THRESHOLDS "
                f"{shown(thresholds)}"
            )
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    for name in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[name]) != channels:
            numbers = "3 numbers" if channels == 3 else "one number, such as [103.53], for INPUT.FORMAT L"
            raise ConfigError(f"MODEL.{name} must hold {numbers}, got {shown(model[name])}")


def _check_data(cfg: CN) -> None:
    crop = cfg.INPUT.CROP
    if crop.TYPE.startswith("relative") and max(crop.SIZE) > 1:
        raise ConfigError(f"INPUT.CROP.SIZE = {shown(crop.SIZE)} must be parts between 0 and 1 for TYPE {crop.TYPE}")
    if crop.TYPE.startswith("absolute") and (min(crop.SIZE) < 1 or any(isinstance(s, float) for s in crop.SIZE)):
        raise ConfigError(f"INPUT.CROP.SIZE = {shown(crop.SIZE)} must be whole pixels for TYPE {crop.TYPE}")
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
