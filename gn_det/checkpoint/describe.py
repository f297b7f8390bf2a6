"""Describe a weights file in words: its parts, classes, preprocessing and the config keys it needs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from gn_det.checkpoint.compatibility import NORM_NAMES, STYLES, needed_keys
from gn_det.checkpoint.formats.common import Weights
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.parameter_names import PARTS, Architecture, architecture_of, part_of, shorten
from gn_det.checkpoint.preprocessing import Preprocessing, show
from gn_det.checkpoint.weights_uri import local_path, sha256_of
from gn_det.text import one_line


def describe(path_or_uri: str) -> list[str]:
    """Return lines about the content of a weights file and the config keys it needs.

    Raises:
        WeightsError: unreadable.
    """
    weights = open_weights(path_or_uri, must_know=False)
    path, state = local_path(path_or_uri), weights.state
    found = architecture_of(state)
    norm = weights.norm or found.norm
    kind = (weights.kind, found.resnet, NORM_NAMES.get(norm, norm) if found.blocks else "")
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    parts = Counter(map(part_of, state))
    names = f": {one_line(shorten(weights.class_names, 5), 400)}" if weights.class_names else ""
    clips = any(v.dim() == 5 for v in state.values())
    rows = {
        "file": f"{os.path.getsize(path) / 1e6:.1f} MB, sha256 {sha256_of(path)}",
        "holds": one_line(", ".join(filter(None, kind))),
        "tensors": f"{len(state)}, {sum(v.numel() for v in state.values()) / 1e6:.1f} M numbers, {', '.join(dtypes)}",
        "parts": ", ".join(f"{part} {parts[part]}" for part in PARTS if parts[part]),
        "classes": f"{weights.num_classes}{names}" if weights.num_classes else "",
        "goes into": "gn-det predict on videos"
        if clips
        else STYLES[found.style][0] or "a backbone: backbone.bottom_up with FPN, backbone and roi_heads.res5 without"
        if found.blocks
        else "no known model",
        "preprocessing": _preprocessing(weights),
        "config keys": "" if clips else _keys(weights, found),
        "not used": shorten(weights.ignored) if weights.ignored else "",
        "provenance": _provenance(weights),
    }
    return [path_or_uri, *(f"  {name:14s}{value}" for name, value in rows.items() if value)]


def expects(needs: Preprocessing) -> str:
    """Return channel order, mean, std and stride as a sentence."""
    mean, std = (show(values) if values else "unknown" for values in (needs.pixel_mean, needs.pixel_std))
    stride = {True: "; stride in the 1x1", False: "; stride in the 3x3", None: ""}[needs.stride_in_1x1]
    return f"{needs.format or 'channel order unknown'}, mean {mean}, std {std} (of 0-255){stride}"


def _preprocessing(weights: Weights) -> str:
    """Return what the weights expect, and how loading adapts it."""
    if weights.preprocessing is None:
        ask = "; append ?preprocessing=caffe or ?preprocessing=torch to the name" if weights.asks else ""
        return f"unknown{ask}"
    folded = "; order and std are folded into the stem on load" if weights.foldable else ""
    return expects(weights.preprocessing) + folded


def _keys(weights: Weights, found: Architecture) -> str:
    norm = weights.norm or found.norm
    keys: dict[str, Any] = {"MODEL.RESNETS.DEPTH": found.depth or None}
    if found.blocks:
        keys["MODEL.RESNETS.NORM"] = {"affine BN": "FrozenBN", "BN": "FrozenBN", "affine": "GN"}.get(norm, norm)
    keys |= needed_keys(weights, found)
    if weights.foldable:
        if keys.pop("INPUT.FORMAT") == "RGB" and keys["MODEL.PIXEL_MEAN"]:
            keys["MODEL.PIXEL_MEAN"] = keys["MODEL.PIXEL_MEAN"][::-1]
        del keys["MODEL.PIXEL_STD"]
    return " ".join(f"{key} {show(value)}" for key, value in keys.items() if value not in (None, ""))


def _provenance(weights: Weights) -> str:
    steps = (weights.meta or {}).get("provenance")
    return " -> ".join(_step(s) for s in steps if isinstance(s, dict)) if isinstance(steps, (list, tuple)) else ""


def _step(step: dict[str, Any]) -> str:
    """Describe the source of a conversion, or a classifier of ``gn-det classify`` with its epoch and error."""
    if step.get("trained") is not True:
        return f"{one_line(step.get('source', ''), 80)} (sha256 {one_line(step.get('sha256', ''), 64)[:12]})"
    error = step.get("top1_error", step.get("val_error"))
    shown = f", top-1 error {error:.2f} %" if isinstance(error, float) else ""
    return f"{one_line(step.get('kind', ''), 80)} (epoch {one_line(step.get('epoch', '?'), 12)}{shown})"
