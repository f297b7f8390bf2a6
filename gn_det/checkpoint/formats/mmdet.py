"""mmdetection's Mask R-CNN detectors (``configs/gn``), of versions 1 to 3.

Background is the last class since version 2 and was the first before; the number of rows of ``fc_reg`` shows which.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from gn_det.checkpoint.formats import torchvision
from gn_det.checkpoint.formats.common import NameTable, State, Weights, classes_last
from gn_det.checkpoint.meta import names_of_classes
from gn_det.checkpoint.preprocessing import Preprocessing
from gn_det.config.schema import WS_SECTIONS

_NORMED = r"\.(?:conv\.(weight|bias)|(?:gn|bn)\.(\w+))"
_PLAIN = r"\.(weight|bias)"
_BOX_HEAD, _MASK_HEAD = r"(?:roi_head\.)?bbox_head\.", r"(?:roi_head\.)?mask_head\."
_RPN = {"conv": "conv", "cls": "objectness_logits", "reg": "anchor_deltas"}
_BOX = {"cls": "cls_score", "reg": "bbox_pred"}
_MASK = {"upsample": "deconv", "conv_logits": "predictor"}


def _leaf(match: re.Match[str], at: int) -> str:
    return match[at] or f"norm.{match[at + 1]}"


#: Names of the parts beside the backbone; ``roi_head.`` is absent in version 1.
_heads = NameTable(
    (rf"neck\.lateral_convs\.([0-3]){_NORMED}", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.{_leaf(m, 2)}"),
    (rf"neck\.fpn_convs\.([0-3]){_NORMED}", lambda m: f"backbone.fpn_output{int(m[1]) + 2}.{_leaf(m, 2)}"),
    (rf"rpn_head\.rpn_(conv|cls|reg){_PLAIN}", lambda m: f"proposal_generator.rpn_head.{_RPN[m[1]]}.{m[2]}"),
    (rf"{_BOX_HEAD}shared_convs\.(\d+){_NORMED}", lambda m: f"roi_heads.box_head.conv{int(m[1]) + 1}.{_leaf(m, 2)}"),
    (rf"{_BOX_HEAD}shared_fcs\.(\d+){_PLAIN}", lambda m: f"roi_heads.box_head.fc{int(m[1]) + 1}.{m[2]}"),
    (rf"{_BOX_HEAD}fc_(cls|reg){_PLAIN}", lambda m: f"roi_heads.box_predictor.{_BOX[m[1]]}.{m[2]}"),
    (rf"{_MASK_HEAD}convs\.(\d+){_NORMED}", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{_leaf(m, 2)}"),
    (rf"{_MASK_HEAD}(upsample|conv_logits){_PLAIN}", lambda m: f"roi_heads.mask_head.{_MASK[m[1]]}.{m[2]}"),
)


def map_name(name: str) -> str | None:
    """Return Detectron2's name, or None when no row of the table matches."""
    if name.startswith("backbone."):
        inner = torchvision.map_name(name.removeprefix("backbone."))
        return None if inner is None else f"backbone.bottom_up.{inner}"
    return _heads(name)


def recognizes(names: Collection[str]) -> bool:
    return any(name.startswith(("neck.lateral_convs.", "neck.fpn_convs.")) for name in names)


def translate(state: State, payload: Mapping[str, Any]) -> Weights:
    """Translate a detector: names, class order of version 1, preprocessing and class names from ``meta``."""
    kept = {map_name(name) or name: value for name, value in state.items()}
    scores, boxes = (kept.get(f"roi_heads.box_predictor.{n}.weight") for n in ("cls_score", "bbox_pred"))
    if scores is not None and boxes is not None and scores.dim() and boxes.shape[:1] == (4 * scores.shape[0],):
        classes_last(kept)
    meta = payload.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    is_gn = "backbone.gn1.weight" in state
    config = meta.get("config", meta.get("cfg"))
    config = config if isinstance(config, str) and len(config) <= 1 << 20 else ""
    dataset = meta.get("dataset_meta")
    names = dataset.get("classes", dataset.get("CLASSES")) if isinstance(dataset, Mapping) else meta.get("CLASSES")
    ws = "jhu" if re.search(r"type\s*=\s*['\"]ConvWS['\"]", config) else ""  # of all parts or none
    return Weights(
        kept,
        "mmdetection detector",
        "GN" if is_gn else "",
        (32, 0) if is_gn or any(".gn." in name for name in state) else None,
        ws=dict.fromkeys(WS_SECTIONS, ws) if config else {},
        preprocessing=preprocessing_of(config),
        foldable=True,
        class_names=names_of_classes(names),
    )


_NORMALIZE = re.compile(r"mean\s*=\s*\[([-+0-9.eE,\s]+)\],\s*std\s*=\s*\[([-+0-9.eE,\s]+)\]")
_TO_RGB = re.compile(r"(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)")
_STYLE = re.compile(r"style\s*=\s*['\"](pytorch|caffe)['\"]")


def preprocessing_of(config: str) -> Preprocessing | None:
    """Parse ``mean=[...], std=[...]`` and ``to_rgb`` from the text of an mmdetection config; None if not unique."""
    pairs = {(_triple(m[1]), _triple(m[2])) for m in _NORMALIZE.finditer(config)}
    orders = set(_TO_RGB.findall(config))
    if len(pairs) != 1 or len(orders) != 1:
        return None
    mean, std = pairs.pop()
    if mean is None or std is None:
        return None
    styles = set(_STYLE.findall(config)) or {"pytorch"}
    stride = {"caffe": True, "pytorch": False}[styles.pop()] if len(styles) == 1 else None
    return Preprocessing("RGB" if orders == {"True"} else "BGR", mean, std, stride_in_1x1=stride)


def _triple(text: str) -> tuple[float, float, float] | None:
    try:
        numbers = [float(number) for number in text.strip().removesuffix(",").split(",", 3)]
    except ValueError:
        return None
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None
