"""Caffe2 / Detectron ImageNet pickles: blob names and what the weights expect of the input.

The pickle is a flat ``{blob name: ndarray}``. Three kinds of norm occur:

==========================================  =======================================  ===============================
norm blobs                                  meaning                                  published as
==========================================  =======================================  ===============================
``_gn_s _gn_b``                             GroupNorm, 32 groups                     FAIR/R-50-GN, FAIR/R-101-GN
``_bn_s _bn_b``                             BN folded into scale and shift           MSRA/R-50, MSRA/R-101 (catalog)
``_bn_gamma _bn_beta _bn_running_{mean,var}``  BN with statistics                    MSRA/R-50, ... (detectron2://)
==========================================  =======================================  ===============================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gn_det.checkpoint.report import Shape
from gn_det.checkpoint.source import Preprocessing

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
# THE table: a blob name that fits none of these rows is unexpected. Tested name by name for.
_STATS = "s|b|gamma|beta|rm|running_mean|riv|running_var"
_TABLE = (
    (re.compile(r"conv1_w$"), lambda m: "stem.conv1.weight"),
    (re.compile(r"conv1_gn_(s|b)$"), lambda m: f"stem.conv1.norm.{_NORM[m[1]]}"),
    (re.compile(rf"res_conv1_bn_({_STATS})$"), lambda m: f"stem.conv1.norm.{_NORM[m[1]]}"),
    (re.compile(r"res([2-5])_(\d+)_(branch1|branch2[abc])_w$"), lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.weight"),
    (
        re.compile(rf"res([2-5])_(\d+)_(branch1|branch2[abc])_(?:gn_(?:s|b)|bn_(?:{_STATS}))$"),
        lambda m: f"res{m[1]}.{m[2]}.{_CONV[m[3]]}.norm.{_NORM[re.split('_[gb]n_', m[0])[1]]}",
    ),
)
# The ImageNet classifier; the optimizer's momentum; conv biases, which Caffe's converter adds as zeros and which no
# Detectron model reads (the norm after the convolution carries the shift).
_IGNORED = re.compile(r"(?:pred|fc1000)_[wb]$|.*_momentum$|conv1_b$|res[2-5]_\d+_branch(?:1|2[abc])_b$|lr$")
_DETECTOR = re.compile(r"(?:conv_rpn|rpn_|cls_score_|bbox_pred_|fpn_|_\[mask\]|mask_fcn|kps_|fc6_|fc7_|head_conv)")


def map_name(blob: str) -> str | None:
    """Detectron2's backbone-relative name of an ImageNet blob, or None when it is not part of the backbone."""
    for pattern, name in _TABLE:
        match = pattern.match(blob)
        if match:
            return name(match)
    return None


def is_ignored(blob: str) -> bool:
    """Whether a blob is known and meant not to be loaded."""
    return _IGNORED.match(blob) is not None


def looks_like_backbone(names: Iterable[str]) -> bool:
    names = set(names)
    return "conv1_w" in names and "res2_0_branch2a_w" in names


def looks_like_detector(names: Iterable[str]) -> bool:
    return any(_DETECTOR.match(name) for name in names)


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
