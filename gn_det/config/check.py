"""Check configs: every value by its key's schema, what the engine implements, and values that must agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvcore.common.config import CfgNode as CN

from gn_det.config.defaults import as_lists, flatten, get_value
from gn_det.config.kinds import bit_depth_span
from gn_det.config.schema import KEYS, WS_SECTIONS
from gn_det.errors import ConfigError
from gn_det.text import did_you_mean, shown
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
    if problem := next(_contradictions(cfg), None):
        raise ConfigError(problem)


def check_config(cfg: CN, engine: str = "embedded") -> None:
    """Raise ConfigError for values that are out of range, contradict each other or that ``engine`` does not implement.

    The message names the key, its value, what is allowed, and the other engine if that one implements it.
    """
    check_values(cfg)
    for name in KEYS:
        _check_implemented(name, get_value(cfg, name), engine)
    if problem := next(_model_contradictions(cfg), None):
        raise ConfigError(problem)


def bit_depth_range(bit_depth: str) -> tuple[float, float] | None:
    """Return LOW and HIGH of an ``INPUT.BIT_DEPTH`` "LOW,HIGH", None for its words; raise ConfigError for others."""
    check_value("INPUT.BIT_DEPTH", bit_depth)
    return bit_depth_span(bit_depth)


def _check_implemented(name: str, value: Any, engine: str) -> None:
    known = KEYS[name].implemented(engine)
    if known is None or _is_among(value, known):
        return
    hint = did_you_mean(str(value), [word for word in known if isinstance(word, str)])
    other = "detectron2" if engine == "embedded" else "embedded"
    if _is_among(value, KEYS[name].implemented(other)):
        hint = f"; --engine {other} runs it"
    raise ConfigError(
        f"{name} is {shown(value)}, which is not implemented by the {engine} engine; "
        f"use {' or '.join(map(shown, known))}{hint}"
    )


def _is_among(value: Any, known: tuple[Any, ...] | None) -> bool:
    return known is None or as_lists(value) in map(as_lists, known)


# ------------------------------------------------------------ size


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


# ------------------------------------------------------------ keys that must agree


def _contradictions(cfg: CN) -> Iterator[str]:
    """Yield what is wrong between keys for any model, in Detectron2's configs too."""
    for name in ("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.RETINANET"):
        labels, thresholds = get_value(cfg, name).IOU_LABELS, get_value(cfg, name).IOU_THRESHOLDS
        if len(labels) != len(thresholds) + 1:
            yield f"{name}.IOU_LABELS {shown(labels)} must have one more entry than IOU_THRESHOLDS {shown(thresholds)}"
    kind, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    if kind.startswith("relative") and max(size) > 1:
        yield f"INPUT.CROP.SIZE is {shown(size)}; it must be fractions up to 1 for TYPE {kind}"
    if kind.startswith("absolute") and (min(size) < 1 or any(isinstance(side, float) for side in size)):
        yield f"INPUT.CROP.SIZE is {shown(size)}; it must be whole pixels for TYPE {kind}"
    if cfg.INPUT.COPY_PASTE and not cfg.MODEL.MASK_ON:
        amount = f"{cfg.INPUT.COPY_PASTE:g}"
        yield f"INPUT.COPY_PASTE {amount} pastes objects by their masks, but MODEL.MASK_ON is False; set COPY_PASTE 0"
    data = cfg.DATASETS
    sources = {"VAL_FOLD": data.VAL_FOLD[1], "VAL_FRACTION": data.VAL_FRACTION, "VAL_JSON": data.VAL_JSON}
    given = [name for name, value in sources.items() if value]
    if given and given[0] != "VAL_JSON":
        held_out = f"DATASETS.{given[0]} holds out a part of DATASETS.TRAIN_JSON"
        if len(given) > 1:
            yield f"{held_out}, but DATASETS.{given[1]} is set, too; set only one"
        if not data.TRAIN_JSON:
            yield f"{held_out}, which is not set; set it, too"
    for part in ("TRAIN", "VAL"):
        missing = [key for key in (f"{part}_JSON", f"{part}_IMAGES") if not data[key]]
        if len(missing) == 1:
            flag = f"--{missing[0].lower().replace('_', '-')}"
            yield f"DATASETS.{missing[0]} is missing (flag {flag}); set both or none"


def _model_contradictions(cfg: CN) -> Iterator[str]:
    """Yield what is wrong between keys for the models that gn_det builds."""
    model, resnets, backbone = cfg.MODEL, cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.NAME
    architecture, heads, box_head = model.META_ARCHITECTURE, model.ROI_HEADS, model.ROI_BOX_HEAD
    if cfg.TEST.AUG.ENABLED and architecture != "GeneralizedRCNN":
        yield f"TEST.AUG.ENABLED True is for GeneralizedRCNN, not {architecture}; set it False"
    if cfg.TEST.PRECISE_BN.ENABLED and cfg.SOLVER.EMA.ENABLED:
        yield "TEST.PRECISE_BN.ENABLED does not go with SOLVER.EMA.ENABLED, which has its own statistics; disable one"
    if model.BACKBONE.RECOMPUTE and resnets.NORM.endswith(("BN", "BN_N")) and resnets.NORM != "FrozenBN":
        twice = f"would count each batch twice in the statistics of MODEL.RESNETS.NORM {resnets.NORM}"
        yield f"MODEL.BACKBONE.RECOMPUTE True {twice}; take GN or FrozenBN, or set it False"
    if box_head.CLASS_WEIGHTS and box_head.USE_SIGMOID_CE:
        yield "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS weighs the softmax loss, but USE_SIGMOID_CE is True; set one of them"
    if resnets.DEPTH in (18, 34):
        for name, value in {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "RES5_DILATION": 1}.items():
            if resnets[name] != value:
                yield f"MODEL.RESNETS.{name} must be {value} for MODEL.RESNETS.DEPTH {resnets.DEPTH}"
    fpn = "_fpn_" in backbone
    features = ["p2", "p3", "p4", "p5", "p6"] if fpn else ["stem", "res2", "res3", "res4", "res5"]
    features += ["p7"] * ("retinanet" in backbone)
    for section in ("RETINANET",) if architecture == "RetinaNet" else ("RPN", "ROI_HEADS"):
        for feature in model[section].IN_FEATURES:
            if feature not in features:
                missing = f"MODEL.BACKBONE.NAME {backbone} has no {shown(feature)}"
                yield f"MODEL.{section}.IN_FEATURES: {missing}; use {', '.join(features)}"
    if fpn and list(model.FPN.IN_FEATURES) != list(resnets.OUT_FEATURES):
        yield "MODEL.FPN.IN_FEATURES and MODEL.RESNETS.OUT_FEATURES must name the same features"
    if fpn and "Res5ROIHeads" in heads.NAME and architecture == "GeneralizedRCNN":
        yield (
            f"MODEL.ROI_HEADS.NAME {heads.NAME} does not work with MODEL.BACKBONE.NAME {backbone}; "
            "use StandardROIHeads with FPN"
        )
    if resnets.get("VARIANT", "v1") != "v1":
        needs = {
            "MODEL.BACKBONE.NAME": (fpn, "an FPN backbone"),
            "MODEL.RESNETS.DEPTH": (resnets.DEPTH >= 50, "50, 101 or 152"),
            "MODEL.RESNETS.NORM": (resnets.NORM != "", "a norm, such as GN"),
            "MODEL.RESNETS.STRIDE_IN_1X1": (not resnets.STRIDE_IN_1X1, "False"),
            "MODEL.RESNETS.NUM_GROUPS": (resnets.NUM_GROUPS == 1, "1"),
            "MODEL.RESNETS.RES5_DILATION": (resnets.RES5_DILATION == 1, "1"),
        }
        for key, (good, need) in needs.items():
            if not good:
                yield f"MODEL.RESNETS.VARIANT {resnets.VARIANT} needs {key} {need}"
    for section in WS_SECTIONS:
        formula = model.get("WS", {}).get(section, "")
        if formula and not model[section].NORM:
            key = f"MODEL.WS.{section}"
            yield f"{key} {formula} needs a norm; set MODEL.{section}.NORM GN, or {key} ''"
    if heads.NAME == "CascadeROIHeads":
        cascade, name = model.ROI_BOX_CASCADE_HEAD, "MODEL.ROI_BOX_CASCADE_HEAD"
        stages, weights = len(cascade.IOUS), len(cascade.BBOX_REG_WEIGHTS)
        if stages != weights:
            yield f"{name}.IOUS and BBOX_REG_WEIGHTS need one entry for each stage; they have {stages} and {weights}"
        if not box_head.CLS_AGNOSTIC_BBOX_REG:
            yield "MODEL.ROI_HEADS.NAME CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
        if cascade.IOUS[0] != heads.IOU_THRESHOLDS[0]:
            first = f"MODEL.ROI_HEADS.IOU_THRESHOLDS {shown(heads.IOU_THRESHOLDS)}"
            yield f"{name}.IOUS {shown(cascade.IOUS)} must begin with {first}"
    for name in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[name]) != (1 if cfg.INPUT.FORMAT == "L" else 3):
            numbers = "one number, such as [103.53]," if cfg.INPUT.FORMAT == "L" else "3 numbers"
            yield f"MODEL.{name} must have {numbers} for INPUT.FORMAT {cfg.INPUT.FORMAT}, got {shown(model[name])}"
