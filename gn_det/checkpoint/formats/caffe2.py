"""Caffe2 / Detectron pickles of ImageNet backbones and COCO detectors: blob names and preprocessing.

A backbone is a flat ``{blob name: ndarray}``; a detector is ``{"blobs": ..., "cfg": YAML text}``, whose blobs include
the optimizer's momentum. Backbones have one of three kinds of norm:

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

import base64
import re
import struct
from collections.abc import Collection, Mapping
from typing import Any

from gn_det.checkpoint.formats.common import NameTable, State, Weights, classes_last
from gn_det.checkpoint.preprocessing import CAFFE, Preprocessing

_CONV = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_NORM = {"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
_NORM |= {"rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var"}
_RPN = {"conv_rpn": "conv", "rpn_cls_logits": "objectness_logits", "rpn_bbox_pred": "anchor_deltas"}
_LEAF = {"w": "weight", "b": "bias", "gn_s": "norm.weight", "gn_b": "norm.bias"}
_STATS = f"({'|'.join(_NORM)})"
_BLOCK = r"res([2-5])_(\d+)_(branch1|branch2[abc])_"
#: Detectron2's backbone-relative name of an ImageNet blob. Tested name by name.
map_name = NameTable(
    (r"conv1_w", "stem.conv1.weight"),
    (r"conv1_gn_(s|b)", lambda m: f"stem.conv1.norm.{_NORM[m[1]]}"),
    (rf"res_conv1_bn_{_STATS}", lambda m: f"stem.conv1.norm.{_NORM[m[1]]}"),
    (rf"{_BLOCK}w", lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.weight"),
    (rf"{_BLOCK}gn_(s|b)", lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.norm.{_NORM[m[4]]}"),
    (rf"{_BLOCK}bn_{_STATS}", lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.norm.{_NORM[m[4]]}"),
)
_L = "(w|b|gn_s|gn_b)"
#: Detectron2's name of a detector's other blobs. FPN blobs are named after the last block of their stage; the topmost
#: lateral has no "_lateral". RPN is shared by all levels and named after the finest.
map_head_name = NameTable(
    (rf"fpn_inner_res([2-5])_\d+_sum(?:_lateral)?_{_L}", lambda m: f"backbone.fpn_lateral{m[1]}.{_LEAF[m[2]]}"),
    (rf"fpn_res([2-5])_\d+_sum_{_L}", lambda m: f"backbone.fpn_output{m[1]}.{_LEAF[m[2]]}"),
    (
        r"(conv_rpn|rpn_cls_logits|rpn_bbox_pred)(?:_fpn2)?_(w|b)",
        lambda m: f"proposal_generator.rpn_head.{_RPN[m[1]]}.{_LEAF[m[2]]}",
    ),
    (rf"head_conv(\d+)_{_L}", lambda m: f"roi_heads.box_head.conv{m[1]}.{_LEAF[m[2]]}"),
    (r"fc([67])_(w|b)", lambda m: f"roi_heads.box_head.fc{int(m[1]) - 5}.{_LEAF[m[2]]}"),
    (r"(cls_score|bbox_pred)_(w|b)", lambda m: f"roi_heads.box_predictor.{m[1]}.{_LEAF[m[2]]}"),
    (rf"_\[mask\]_fcn(\d+)_{_L}", lambda m: f"roi_heads.mask_head.mask_fcn{m[1]}.{_LEAF[m[2]]}"),
    (r"conv5_mask_(w|b)", lambda m: f"roi_heads.mask_head.deconv.{_LEAF[m[1]]}"),
    (r"mask_fcn_logits_(w|b)", lambda m: f"roi_heads.mask_head.predictor.{_LEAF[m[1]]}"),
)
_CLASSIFIER = re.compile(r"(?:pred|fc1000)_([wb])$")
# The ImageNet classifier; the optimizer's momentum; conv biases, which Caffe's converter adds as zeros and which no
# Detectron model reads (the norm after the convolution carries the shift).
_IGNORED = re.compile(r"(?:pred|fc1000)_[wb]$|.*_momentum$|conv1_b$|res[2-5]_\d+_branch(?:1|2[abc])_b$|lr$")
_DETECTOR = re.compile(r"(?:conv_rpn|rpn_|cls_score_|bbox_pred_|fpn_|_\[mask\]|mask_fcn|kps_|fc6_|fc7_|head_conv)")
# Detectron's default and what all its published detectors were trained with; its ImageNet backbones were not.
_DETECTOR_MEAN = (102.9801, 115.9465, 122.7717)
_RPN_RATIOS = 3  # aspect ratios per anchor size, Detectron's default
_DIFFERS = (
    "Detectron's anchors, box widths and RoIAlign differ from Detectron2's by up to a pixel: fine-tuning adapts to "
    "that, but without it these weights do not give exactly the published numbers"
)


def is_ignored(blob: str) -> bool:
    """Return whether a blob is known and ignored on purpose."""
    return _IGNORED.match(blob) is not None


def recognizes(names: Collection[str]) -> bool:
    return is_detector(names) or ("conv1_w" in names and "res2_0_branch2a_w" in names)


def is_detector(names: Collection[str]) -> bool:
    """Return whether there are blobs of a detector's heads."""
    return any("." not in name and _DETECTOR.match(name) for name in names)  # PyTorch's names have dots


def norm_kind(names: Collection[str]) -> str:
    """Return the norm of the blobs: "GN", "affine BN" (folded into scale and shift) or "BN" (with statistics)."""
    if "conv1_gn_s" in names:
        return "GN"
    return "BN" if "res_conv1_bn_running_mean" in names or "res_conv1_bn_rm" in names else "affine BN"


def _preprocessing(state: State, norm: str, mean: tuple[float, ...] | None) -> Preprocessing:
    """Return what the published Caffe2 models were trained with (design facts, not read from the file).

    All are BGR in 0-255. FAIR's GN and ResNeXt models stride in the 3x3 convolution, MSRA's in the 1x1. The GN and
    MSRA models divide by nothing; Detectron2 lists two conventions for ResNeXt's std, so that is left unchecked.
    """
    first, second = state.get("res2_0_branch2a_w"), state.get("res2_0_branch2b_w")
    grouped = (
        first is not None and second is not None and first.dim() == second.dim() == 4 and len(first) != second.shape[1]
    )
    std = None if grouped else CAFFE.pixel_std
    return Preprocessing("BGR", mean, std, stride_in_1x1=not grouped and norm != "GN")


def translate(state: State, payload: Mapping[str, Any]) -> Weights:
    """Translate an ImageNet backbone to bare names, or a COCO detector: names, class order, order of C4's anchors.

    Raises:
        WeightsError: the detector has class-agnostic boxes or masks, or heads of other tasks.
    """
    detector, fpn = is_detector(state), any(name.startswith("fpn_") for name in state)
    kept: State = {}
    for blob, value in state.items():
        name = map_name(blob)
        if name is not None:
            c4 = "roi_heads." if name.startswith("res5.") else "backbone."
            kept[("backbone.bottom_up." if fpn else c4 if detector else "") + name] = value
        elif not is_ignored(blob):
            kept[map_head_name(blob) or blob] = value
    mean = CAFFE.pixel_mean
    if detector:
        mean = _pixel_means(payload.get("cfg")) or _DETECTOR_MEAN
        classes_last(kept)
        if not fpn:
            _anchors_by_size(kept)
    norm = norm_kind(state)
    return Weights(
        kept,
        "Caffe2 / Detectron detector" if detector else "Caffe2 ImageNet backbone",
        norm,
        (32, 0) if any(re.search(r"_gn_[sb]$", name) for name in state) else None,
        tuple(filter(is_ignored, state)),
        _preprocessing(state, norm, mean),
        aside={f"stem.fc.{_LEAF[m[1]]}": value for name, value in state.items() if (m := _CLASSIFIER.match(name))},
        notes=(_DIFFERS,) if detector else (),
    )


def _anchors_by_size(state: State) -> None:
    """Reorder C4's RPN channels in place from Detectron's (aspect ratio, size) to our (size, aspect ratio)."""
    for layer, per_anchor in (("objectness_logits", 1), ("anchor_deltas", 4)):
        for leaf in ("weight", "bias"):
            name = f"proposal_generator.rpn_head.{layer}.{leaf}"
            value = state.get(name)
            if value is not None and value.numel() and value.dim() and value.shape[0] % (per_anchor * _RPN_RATIOS) == 0:
                blocks = value.reshape(_RPN_RATIOS, -1, per_anchor, *value.shape[1:])
                state[name] = blocks.transpose(0, 1).reshape(value.shape)


def _pixel_means(text: Any) -> tuple[float, ...] | None:
    """Parse PIXEL_MEANS of Detectron's dumped config: a nested list, or a pickled float64 array in YAML."""
    text = str(text, "latin1") if isinstance(text, (bytes, memoryview)) else text
    if not isinstance(text, str) or len(text) > 1 << 20:
        return None
    entry = re.search(r"^PIXEL_MEANS:(.*(?:\n[ \t-].*)*)", text, flags=re.MULTILINE)
    value = entry[1] if entry else ""
    if array := re.search(r"!!binary \|\s*([A-Za-z0-9+/]{32})\s*$", value):
        return struct.unpack("<3d", base64.b64decode(array[1]))
    numbers = re.sub(r"[\s\[\],]+|-(?=\s)", " ", value).split()
    try:
        return tuple(map(float, numbers)) if len(numbers) == 3 else None
    except ValueError:
        return None
