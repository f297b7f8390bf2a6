"""Caffe2 / Detectron pickles, ImageNet backbones and COCO detectors: blob names and what the weights expect.

A backbone is a flat ``{blob name: ndarray}``; a detector is ``{"blobs": ..., "cfg": YAML text}`` with the optimizer's
momentum among the blobs. Three kinds of norm occur in the backbone:

==========================================  =======================================  ===============================
norm blobs                                  meaning                                  published as
==========================================  =======================================  ===============================
``_gn_s _gn_b``                             GroupNorm, 32 groups                     FAIR/R-50-GN, projects/GN detectors
``_bn_s _bn_b``                             BN folded into scale and shift           MSRA/R-50, model zoo detectors
``_bn_gamma _bn_beta _bn_running_{mean,var}``  BN with statistics                    MSRA/R-50, ... (detectron2://)
==========================================  =======================================  ===============================

Classes: background is the first row of ``cls_score``, ``bbox_pred`` and ``mask_fcn_logits``; in our layout it is the
last row of ``cls_score`` and has no boxes and no masks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from gn_det.checkpoint.report import Shape
from gn_det.checkpoint.source import Preprocessing, Row, State, Weights, first_match
from gn_det.config.reader import parse_yaml
from gn_det.errors import ConfigError, WeightsError
from gn_det.text import one_line

_CONV = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_NORM = {
    "s": "weight",
    "b": "bias",
    "gamma": "weight",
    "beta": "bias",
    "rm": "running_mean",
    "running_mean": "running_mean",
    "riv": "running_var",
    "running_var": "running_var",
}
_LEAF = {"w": "weight", "b": "bias", "gn_s": "norm.weight", "gn_b": "norm.bias"}
_RPN = {"conv_rpn": "conv", "rpn_cls_logits": "objectness_logits", "rpn_bbox_pred": "anchor_deltas"}
# THE table of the backbone: a blob name that fits none of these rows is unexpected. Tested name by name.
_STATS = "s|b|gamma|beta|rm|running_mean|riv|running_var"
_TABLE: tuple[Row, ...] = (
    (re.compile(r"conv1_w$"), lambda m: "stem.conv1.weight"),
    (re.compile(r"conv1_gn_(s|b)$"), lambda m: f"stem.conv1.norm.{_NORM[m[1]]}"),
    (re.compile(rf"res_conv1_bn_({_STATS})$"), lambda m: f"stem.conv1.norm.{_NORM[m[1]]}"),
    (re.compile(r"res([2-5])_(\d+)_(branch1|branch2[abc])_w$"), lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.weight"),
    (
        re.compile(rf"res([2-5])_(\d+)_(branch1|branch2[abc])_(?:gn_(?:s|b)|bn_(?:{_STATS}))$"),
        lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.norm.{_NORM[re.split('_[gb]n_', m[0])[1]]}",
    ),
)
# THE table of a detector's other blobs. FPN blobs are named after the last block of their stage; the topmost lateral
# has no "_lateral". RPN is shared by all levels and named after the finest.
_L = "(w|b|gn_s|gn_b)$"
_HEADS: tuple[Row, ...] = (
    (
        re.compile(rf"fpn_inner_res([2-5])_\d+_sum(?:_lateral)?_{_L}"),
        lambda m: f"backbone.fpn_lateral{m[1]}.{_LEAF[m[2]]}",
    ),
    (re.compile(rf"fpn_res([2-5])_\d+_sum_{_L}"), lambda m: f"backbone.fpn_output{m[1]}.{_LEAF[m[2]]}"),
    (
        re.compile(r"(conv_rpn|rpn_cls_logits|rpn_bbox_pred)(?:_fpn2)?_(w|b)$"),
        lambda m: f"proposal_generator.rpn_head.{_RPN[m[1]]}.{_LEAF[m[2]]}",
    ),
    (re.compile(rf"head_conv(\d+)_{_L}"), lambda m: f"roi_heads.box_head.conv{m[1]}.{_LEAF[m[2]]}"),
    (re.compile(r"fc([67])_(w|b)$"), lambda m: f"roi_heads.box_head.fc{int(m[1]) - 5}.{_LEAF[m[2]]}"),
    (re.compile(r"(cls_score|bbox_pred)_(w|b)$"), lambda m: f"roi_heads.box_predictor.{m[1]}.{_LEAF[m[2]]}"),
    (re.compile(rf"_\[mask\]_fcn(\d+)_{_L}"), lambda m: f"roi_heads.mask_head.mask_fcn{m[1]}.{_LEAF[m[2]]}"),
    (re.compile(r"conv5_mask_(w|b)$"), lambda m: f"roi_heads.mask_head.deconv.{_LEAF[m[1]]}"),
    (re.compile(r"mask_fcn_logits_(w|b)$"), lambda m: f"roi_heads.mask_head.predictor.{_LEAF[m[1]]}"),
)
_CLASSIFIER = re.compile(r"(?:pred|fc1000)_([wb])$")
# The ImageNet classifier; the optimizer's momentum; conv biases, which Caffe's converter adds as zeros and which no
# Detectron model reads (the norm after the convolution carries the shift).
_IGNORED = re.compile(r"(?:pred|fc1000)_[wb]$|.*_momentum$|conv1_b$|res[2-5]_\d+_branch(?:1|2[abc])_b$|lr$")
_DETECTOR = re.compile(r"(?:conv_rpn|rpn_|cls_score_|bbox_pred_|fpn_|_\[mask\]|mask_fcn|kps_|fc6_|fc7_|head_conv)")
# Detectron's default and what all its published detectors were trained with; its ImageNet backbones were not.
_DETECTOR_MEAN = (102.9801, 115.9465, 122.7717)
_RPN_RATIOS = 3  # aspect ratios per anchor size, Detectron's default


def map_name(blob: str) -> str | None:
    """Detectron2's backbone-relative name of an ImageNet blob, or None when it is not part of the backbone."""
    return first_match(_TABLE, blob)


def map_head_name(blob: str) -> str | None:
    """Detectron2's name of a detector's blob outside the backbone, or None when no row of the table knows it."""
    return first_match(_HEADS, blob)


def is_ignored(blob: str) -> bool:
    """Whether a blob is known and meant not to be loaded."""
    return _IGNORED.match(blob) is not None


def looks_like_backbone(names: Iterable[str]) -> bool:
    names = set(names)
    return "conv1_w" in names and "res2_0_branch2a_w" in names


def looks_like_detector(names: Iterable[str]) -> bool:
    return any("." not in name and _DETECTOR.match(name) for name in names)  # PyTorch's names have dots


def norm_kind(names: Iterable[str]) -> str:
    """Norm of the blobs: "GN", "affine BN" (folded into scale and shift) or "BN" (with statistics)."""
    names = set(names)
    if "conv1_gn_s" in names:
        return "GN"
    return "BN" if names & {"res_conv1_bn_running_mean", "res_conv1_bn_rm"} else "affine BN"


def preprocessing_of(shapes: Mapping[str, Shape]) -> Preprocessing:
    """What the published Caffe2 models were trained with (design facts, not read from the file).

    All are BGR in 0-255. FAIR's GN and ResNeXt models stride in the 3x3 convolution, MSRA's in the 1x1. The GN and
    MSRA models divide by nothing; Detectron2 lists two conventions for ResNeXt's std, so that is left unchecked.
    """
    norm = norm_kind(shapes)
    second, first = shapes.get("res2_0_branch2b_w", ()), shapes.get("res2_0_branch2a_w", ())
    grouped = len(second) == 4 and len(first) == 4 and second[1] != first[0]
    return Preprocessing(
        format="BGR",
        pixel_mean=(103.530, 116.280, 123.675),
        pixel_std=None if grouped else (1.0, 1.0, 1.0),
        stride_in_1x1=not grouped and norm != "GN",
    )


def translate_backbone(state: State, payload: Mapping[str, Any]) -> Weights:
    """An ImageNet backbone, by bare names (``res2.0.conv1.weight``)."""
    ignored = tuple(name for name in state if is_ignored(name))
    kept = {map_name(name) or name: value for name, value in state.items() if not is_ignored(name)}
    norm = norm_kind(state)
    return Weights(
        kept,
        "Caffe2 ImageNet backbone",
        norm,
        (32, 0) if norm == "GN" else None,
        ignored,
        preprocessing_of(_shapes(state)),
        aside=_classifier(state),
    )


def translate_detector(state: State, payload: Mapping[str, Any]) -> Weights:
    """A COCO detector (FPN, or C4 with res5 in the heads): names, class order, order of C4's anchors.

    Raises:
        WeightsError: a detector without class-specific boxes and masks, or with other tasks' heads.
    """
    kept: State = {}
    ignored = tuple(name for name in state if is_ignored(name))
    skip = set(ignored)
    fpn = any(name.startswith("fpn_") for name in state)
    for blob, value in state.items():
        if blob in skip:
            continue
        name = map_name(blob)
        if name is not None:
            head = not fpn and name.startswith("res5.")
            kept[("backbone.bottom_up." if fpn else "roi_heads." if head else "backbone.") + name] = value
        else:
            kept[map_head_name(blob) or blob] = value
    classes_last(kept)
    if not fpn:
        _anchors_by_size(kept)
    norm = norm_kind(state)
    found = preprocessing_of(_shapes(state))
    mean = _pixel_means(payload.get("cfg")) or _DETECTOR_MEAN
    needs = Preprocessing(found.format, mean, found.pixel_std, found.stride_in_1x1)
    weights = Weights(
        kept, "Caffe2 / Detectron detector", norm, (32, 0) if "gn" in _norms(state) else None, ignored, needs
    )
    weights.notes = (
        "Detectron's anchors, box widths and RoIAlign differ from Detectron2's by up to a pixel: fine-tuning adapts, "
        "but evaluated as they are these weights do not give exactly the published numbers",
    )
    return weights


def classes_last(state: State) -> None:
    """Background from the first row to the last (scores) or away (boxes, masks), in place.

    Raises:
        WeightsError: rows that do not belong to one number of classes.
    """
    box, mask = "roi_heads.box_predictor.", "roi_heads.mask_head.predictor."
    scores = state.get(box + "cls_score.weight")
    if scores is None or not scores.dim():
        return
    rows = scores.shape[0]
    for leaf in ("weight", "bias"):
        for name, per_class in ((box + "bbox_pred." + leaf, 4), (mask + leaf, 1)):
            if name not in state:
                continue
            value = state[name]
            if not value.dim() or value.shape[0] != per_class * rows:
                raise WeightsError(
                    f"{name}: has {value.shape[0] if value.dim() else 0} rows, {per_class * rows} would belong to the "
                    f"{rows} classes of cls_score; class-agnostic boxes and masks are not read"
                )
            state[name] = value[per_class:]
        name = box + "cls_score." + leaf
        if name in state and state[name].dim():
            state[name] = torch.cat([state[name][1:], state[name][:1]])


def _anchors_by_size(state: State) -> None:
    """C4's RPN channels from Detectron's order (aspect ratio, size) to ours (size, aspect ratio), in place."""
    for layer, per_anchor in (("objectness_logits", 1), ("anchor_deltas", 4)):
        for leaf in ("weight", "bias"):
            name = f"proposal_generator.rpn_head.{layer}.{leaf}"
            value = state.get(name)
            if value is None or not value.dim() or not value.numel() or value.shape[0] % (per_anchor * _RPN_RATIOS):
                continue
            blocks = value.reshape(_RPN_RATIOS, -1, per_anchor, *value.shape[1:])
            state[name] = blocks.transpose(0, 1).reshape(value.shape)


def _shapes(state: State) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _norms(names: Collection[str]) -> set[str]:
    return {match[1] for name in names if (match := re.search(r"_(gn|bn)_[a-z_]+$", name))}


def _classifier(state: State) -> State:
    found = {name: _CLASSIFIER.match(name) for name in state}
    return {f"stem.fc.{_LEAF[m[1]]}": state[name] for name, m in found.items() if m}


# ---------------------------------------------------------------------------------------- the mean in a detector's cfg


def _pixel_means(text: Any) -> tuple[float, float, float] | None:
    """PIXEL_MEANS of Detectron's dumped config: a nested list, or a pickled array written out as YAML."""
    text = str(text, "latin1") if isinstance(text, (bytes, memoryview)) else text
    if not isinstance(text, str) or len(text) > 1 << 20 or "PIXEL_MEANS" not in text:
        return None
    # Only the one top-level entry is parsed, with what is indented below it.
    match = re.search(r"^PIXEL_MEANS:.*(?:\n[ \t-].*)*", text, flags=re.MULTILINE)
    if not match:
        return None
    try:
        value = parse_yaml(match.group(0), "its cfg", python_tags=True)["PIXEL_MEANS"]
    except ConfigError as error:
        raise WeightsError(f"the file's cfg has an unreadable PIXEL_MEANS ({one_line(error)})") from None
    numbers = _numbers_in(value, depth=0)
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def _numbers_in(value: Any, depth: int) -> list[float]:
    if isinstance(value, dict):  # the state of the array: shape, dtype, order, contents
        value = value.get("state")
        contents = [v for v in value if isinstance(v, (bytes, str))] if isinstance(value, list) else []
        raw = contents[-1].encode("latin1", "ignore") if contents and isinstance(contents[-1], str) else b""
        raw = contents[-1] if contents and isinstance(contents[-1], bytes) else raw
        return [float(v) for v in torch.frombuffer(bytearray(raw), dtype=torch.float64)] if len(raw) == 24 else []
    if isinstance(value, list) and depth < 5 and len(value) <= 3:
        return [number for item in value for number in _numbers_in(item, depth + 1)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
