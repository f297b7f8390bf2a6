"""Check configs: every value by its key's schema, what the engine implements, and values that must agree."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode as CN

from gn_det.config.defaults import as_lists, flatten, get_value
from gn_det.config.kinds import bit_depth_span
from gn_det.config.schema import KEYS, WS_SECTIONS
from gn_det.errors import ConfigError
from gn_det.text import nearest, shown
from gn_det.values import InvalidValue

#: Most weights of a model; the largest published ones have 0.2 billion.
_MAX_WEIGHTS = 2**30


def check_value(name: str, value: Any, source: str = "") -> None:
    """Raise ConfigError for a value that no engine accepts, with ``source``, the key and what is allowed."""
    try:
        KEYS[name].check(value, name)
    except InvalidValue as error:
        raise ConfigError(f"{source}: {error}" if source else str(error)) from None


def check_values(cfg: CN) -> None:
    """Raise ConfigError for values that no engine accepts or that contradict each other."""
    for name, value in flatten(cfg):
        if name in KEYS:  # users of Detectron2 add their own keys
            check_value(name, value)
    check_size(cfg)
    _check_labels(cfg)
    _check_data(cfg)


def check_config(cfg: CN, engine: str = "embedded") -> None:
    """Raise ConfigError for values that are out of range, contradict each other or that ``engine`` does not implement.

    The message names the key, its value, what is allowed, and the other engine if that one implements it.
    """
    check_values(cfg)
    for name in KEYS:
        _check_implemented(name, get_value(cfg, name), engine)
    _check_model(cfg)


def bit_depth_range(bit_depth: str) -> tuple[float, float] | None:
    """Return LOW and HIGH of an ``INPUT.BIT_DEPTH`` "LOW,HIGH", None for its words; raise ConfigError for others."""
    check_value("INPUT.BIT_DEPTH", bit_depth)
    return bit_depth_span(bit_depth)


def _check_implemented(name: str, value: Any, engine: str) -> None:
    known = KEYS[name].implemented(engine)
    if known is None or _is_among(value, known):
        return
    near = nearest(value, [k for k in known if isinstance(k, str)], 1) if isinstance(value, str) else []
    hint = f", did you mean {near[0]!r}?" if near else ""
    other = "detectron2" if engine == "embedded" else "embedded"
    if _is_among(value, KEYS[name].implemented(other)):
        hint = f"; --engine {other} runs it"
    raise ConfigError(
        f"{name} is {shown(value)}, which is not implemented by the {engine} engine; "
        f"use {' or '.join(map(shown, known))}{hint}"
    )


def _is_among(value: Any, known: tuple[Any, ...] | None) -> bool:
    return known is None or as_lists(value) in map(as_lists, known)


# ------------------------------------------------------------ keys that must agree


def check_size(cfg: CN, source: str = "") -> None:
    """Raise ConfigError, which names ``source``, for a model with more weights than any machine can hold."""
    weights = _least_weights(cfg)
    if weights > _MAX_WEIGHTS:
        raise ConfigError(
            f"{source}{': ' if source else ''}MODEL describes about {weights} weights, but at most {_MAX_WEIGHTS} are "
            "allowed; lower channels, classes or MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"
        )


def _least_weights(cfg: CN) -> int:
    """Estimate the number of weights of the large layers."""
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


def _check_labels(cfg: CN) -> None:
    for name in ("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.RETINANET"):
        section = get_value(cfg, name)
        if len(section.IOU_LABELS) != len(section.IOU_THRESHOLDS) + 1:
            raise ConfigError(
                f"{name}.IOU_LABELS {shown(section.IOU_LABELS)} must have one more entry than {name}.IOU_THRESHOLDS "
                f"{shown(section.IOU_THRESHOLDS)}"
            )


def _check_data(cfg: CN) -> None:
    kind, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    if kind.startswith("relative") and max(size) > 1:
        raise ConfigError(f"INPUT.CROP.SIZE is {shown(size)}; it must be fractions up to 1 for TYPE {kind}")
    if kind.startswith("absolute") and (min(size) < 1 or any(isinstance(side, float) for side in size)):
        raise ConfigError(f"INPUT.CROP.SIZE is {shown(size)}; it must be whole pixels for TYPE {kind}")
    if cfg.INPUT.COPY_PASTE and not cfg.MODEL.MASK_ON:
        raise ConfigError(
            f"INPUT.COPY_PASTE {cfg.INPUT.COPY_PASTE:g} pastes objects by their masks, but MODEL.MASK_ON is False; set "
            "INPUT.COPY_PASTE 0"
        )
    data = cfg.DATASETS
    split = "VAL_FOLD" if data.VAL_FOLD[1] else "VAL_FRACTION" if data.VAL_FRACTION else ""
    others = {"VAL_JSON": data.VAL_JSON, "VAL_FRACTION": split == "VAL_FOLD" and data.VAL_FRACTION}
    given = [f"DATASETS.{name} is set, too" for name, value in others.items() if value]
    given += ["DATASETS.TRAIN_JSON is not set"] * (not data.TRAIN_JSON)
    if split and given:
        raise ConfigError(f"DATASETS.{split} holds out a part of DATASETS.TRAIN_JSON, but {given[0]}; set only one")
    for split in ("TRAIN", "VAL"):
        parts = (f"{split}_JSON", f"{split}_IMAGES")
        missing = [part for part in parts if not cfg.DATASETS[part]]
        if len(missing) == 1:
            flag = f"--{missing[0].lower().replace('_', '-')}"
            raise ConfigError(f"DATASETS.{missing[0]} is missing (flag {flag}); set both or none")


def _check_model(cfg: CN) -> None:
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise ConfigError(
            f"TEST.AUG.ENABLED True is for GeneralizedRCNN, not {cfg.MODEL.META_ARCHITECTURE}; set it False"
        )
    if cfg.TEST.PRECISE_BN.ENABLED and cfg.SOLVER.EMA.ENABLED:
        raise ConfigError(
            "TEST.PRECISE_BN.ENABLED does not go with SOLVER.EMA.ENABLED, whose average has statistics of its own; set "
            "one of them False"
        )
    model, resnets, backbone = cfg.MODEL, cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.NAME
    if model.BACKBONE.RECOMPUTE and resnets.NORM.endswith(("BN", "BN_N")) and resnets.NORM != "FrozenBN":
        raise ConfigError(
            f"MODEL.BACKBONE.RECOMPUTE True would count each batch twice in the statistics of MODEL.RESNETS.NORM "
            f"{resnets.NORM}; take GN or FrozenBN, or set it False"
        )
    if model.ROI_BOX_HEAD.CLASS_WEIGHTS and model.ROI_BOX_HEAD.USE_SIGMOID_CE:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS weighs the softmax loss, but MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True; "
            "set one of them"
        )
    if resnets.DEPTH in (18, 34):
        for name, value in {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "RES5_DILATION": 1}.items():
            if resnets[name] != value:
                raise ConfigError(f"MODEL.RESNETS.{name} must be {value} for MODEL.RESNETS.DEPTH {resnets.DEPTH}")
    fpn = "_fpn_" in backbone
    features = ["p2", "p3", "p4", "p5", "p6", "p7"] if fpn else ["stem", "res2", "res3", "res4", "res5"]
    if fpn and "retinanet" not in backbone:
        features.remove("p7")
    for section in ("RETINANET",) if model.META_ARCHITECTURE == "RetinaNet" else ("RPN", "ROI_HEADS"):
        for feature in model[section].IN_FEATURES:
            if feature not in features:
                raise ConfigError(
                    f"MODEL.{section}.IN_FEATURES: MODEL.BACKBONE.NAME {backbone} has no {shown(feature)}; use "
                    f"{', '.join(features)}"
                )
    if fpn and list(model.FPN.IN_FEATURES) != list(resnets.OUT_FEATURES):
        raise ConfigError("MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES must name the same features")
    if fpn and "Res5ROIHeads" in model.ROI_HEADS.NAME and model.META_ARCHITECTURE == "GeneralizedRCNN":
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} does not work with MODEL.BACKBONE.NAME {backbone}; "
            "use StandardROIHeads with FPN"
        )
    if resnets.get("VARIANT", "v1") != "v1":
        _check_pre_activation(model)
    for section in WS_SECTIONS:
        formula = model.get("WS", {}).get(section, "")
        if formula and not model[section].NORM:
            norm = f"MODEL.{section}.NORM"
            raise ConfigError(
                f"MODEL.WS.{section} {formula} is for convolutions with a norm, but {norm} is '': set {norm} GN, or "
                f"MODEL.WS.{section} ''"
            )
    if model.ROI_HEADS.NAME == "CascadeROIHeads":
        _check_cascade(model)
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    for name in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[name]) != channels:
            numbers = "3 numbers" if channels == 3 else "one number, such as [103.53], for INPUT.FORMAT L"
            raise ConfigError(f"MODEL.{name} must have {numbers}, got {shown(model[name])}")


def _check_cascade(model: CN) -> None:
    """Check what CascadeROIHeads of either engine needs."""
    cascade, thresholds = model.ROI_BOX_CASCADE_HEAD, model.ROI_HEADS.IOU_THRESHOLDS
    name = "MODEL.ROI_BOX_CASCADE_HEAD"
    if len(cascade.IOUS) != len(cascade.BBOX_REG_WEIGHTS):
        raise ConfigError(
            f"{name}.IOUS {shown(cascade.IOUS)} and {name}.BBOX_REG_WEIGHTS must have one entry for each stage; they "
            f"have {len(cascade.IOUS)} and {len(cascade.BBOX_REG_WEIGHTS)}"
        )
    if not model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ConfigError("MODEL.ROI_HEADS.NAME CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True")
    if cascade.IOUS[0] != thresholds[0]:
        raise ConfigError(
            f"{name}.IOUS {shown(cascade.IOUS)} must begin with MODEL.ROI_HEADS.IOU_THRESHOLDS {shown(thresholds)}"
        )


def _check_pre_activation(model: CN) -> None:
    """Refuse what the pre-activation ResNets do not have."""
    resnets = model.RESNETS
    needs = {
        "MODEL.BACKBONE.NAME": ("_fpn_" in model.BACKBONE.NAME, "an FPN backbone"),
        "MODEL.RESNETS.DEPTH": (resnets.DEPTH >= 50, "50, 101 or 152"),
        "MODEL.RESNETS.NORM": (resnets.NORM != "", "a norm, such as GN"),
        "MODEL.RESNETS.STRIDE_IN_1X1": (not resnets.STRIDE_IN_1X1, "False"),
        "MODEL.RESNETS.NUM_GROUPS": (resnets.NUM_GROUPS == 1, "1"),
        "MODEL.RESNETS.RES5_DILATION": (resnets.RES5_DILATION == 1, "1"),
    }
    for key, (good, need) in needs.items():
        if not good:
            raise ConfigError(f"MODEL.RESNETS.VARIANT {resnets.VARIANT} needs {key} {need}")
