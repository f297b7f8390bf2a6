"""What weights need of a config beyond names and shapes: depth, style, norm, groups, preprocessing.

:func:`describe` says it in words. A config that says otherwise would load silently and train or predict badly, so each
mismatch is an error that names the keys.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from gn_det.checkpoint.formats.common import PARTS, Architecture, Weights, part_of
from gn_det.checkpoint.open_weights import NORM_KEYS, open_weights
from gn_det.checkpoint.preprocessing import KEYS, Preprocessing, close, show
from gn_det.checkpoint.weights_uri import local_path, sha256_of
from gn_det.config.defaults import get_value
from gn_det.errors import WeightsError
from gn_det.text import count, one_line, some

#: Style -> what the weights are, and the backbone to configure.
_STYLES = {
    "": ("", ""),
    "FPN": ("an FPN detector", "build_resnet_fpn_backbone"),
    "C4": ("a C4 detector", "build_resnet_backbone"),
}
_VARIANTS = {
    "": "",
    "v1": "a post-activation ResNet",
    "bit": "a pre-activation ResNet (BiT)",
    "v2d": "a pre-activation ResNet with a deep stem",
}
_SAME_TENSORS = ("GN", "LN", "IN")
# Norm of the weights -> values of MODEL.RESNETS.NORM that compute the same function, if not that norm alone.
_SUITS = {"affine": _SAME_TENSORS, "BN": ("BN", "SyncBN", "FrozenBN"), "affine BN": ("FrozenBN",)}
_NORM_NAMES = {"affine": "GN, LN or IN", "affine BN": "BN folded into scale and shift", "": "no norm"}
# Section of MODEL.WS -> beginnings of the names of its convolutions.
_CONVOLUTIONS: dict[str, tuple[str, ...]] = {
    "RESNETS": ("res", "backbone.res", "backbone.bottom_up.res", "roi_heads.res5"),
    "FPN": ("backbone.fpn_",),
    "ROI_BOX_HEAD": ("roi_heads.box_head.conv", "roi_heads.box_head.0.conv"),
    "ROI_MASK_HEAD": ("roi_heads.mask_head.mask_fcn",),
}


def check_architecture(source: str, found: Architecture, wanted: Architecture, allow_partial: bool) -> None:
    """Compare depth, variant, style and, unless ``allow_partial``, cascade stages; an unknown value passes."""
    heads = "StandardROIHeads"
    if found.stages:
        heads = f"CascadeROIHeads and MODEL.ROI_BOX_CASCADE_HEAD.IOUS of {found.stages} entries"
    depth = f"MODEL.RESNETS.DEPTH {found.depth}" if found.depth else "MODEL.WEIGHTS to weights of MODEL.RESNETS.DEPTH"
    style, backbone = _STYLES[found.style]
    facts = [
        (found.resnet, wanted.resnet, depth),
        (_VARIANTS[found.variant], _VARIANTS[wanted.variant], f"MODEL.RESNETS.VARIANT {found.variant}"),
        (style, _STYLES[wanted.style][0], f"MODEL.BACKBONE.NAME {backbone} (and its heads)"),
    ]
    if not allow_partial:
        fresh = "or append ?allow_partial=True to MODEL.WEIGHTS to start with fresh box heads"
        facts.append((_stages(found), _stages(wanted), f"MODEL.ROI_HEADS.NAME {heads}, {fresh}"))
    for theirs, ours, keys in facts:
        if theirs and ours and theirs != ours:
            raise WeightsError(f"{source}: holds {theirs}, but the config describes {ours}: set {keys}")


def _stages(architecture: Architecture) -> str:
    if not architecture.stages:
        return "" if architecture.stages is None else "no cascade"
    return count(architecture.stages, "cascade stage")


def check_norm(source: str, weights: Weights, cfg: Any, allow_partial: bool) -> list[str]:
    """Check the norm of the bottom-up network; with ``allow_partial``, return why its norms cannot be loaded.

    Raises:
        WeightsError: the config's norm would compute something else with these weights.
    """
    wanted, norm = get_value(cfg, "MODEL.RESNETS.NORM"), weights.bottom_up_norm
    suits = _SUITS.get(norm, (norm,))
    if not weights.architecture.blocks or wanted in (None, *suits):
        return []
    differ = f"these weights are {_NORM_NAMES.get(norm, norm)}, but the config says {wanted!r}"
    if allow_partial:
        return [f"{differ}: the backbone's norms are not loaded"]
    raise WeightsError(
        f"{source}: {differ}: set MODEL.RESNETS.NORM {' or '.join(map(repr, suits))}, or take weights trained with "
        f"{wanted or 'no norm'} (scale and shift do not carry over)"
    )


def _needed_keys(weights: Weights) -> dict[str, Any]:
    """Return the config keys that the weights state beyond depth and the backbone's norm; None for an unknown value."""
    needs, (groups, per_group) = weights.preprocessing or Preprocessing(), weights.groups or (None, None)
    return {
        **{key: getattr(needs, name) for name, key in KEYS.items()},
        "MODEL.GN.NUM_GROUPS": None if per_group else groups,
        "MODEL.GN.CHANNELS_PER_GROUP": per_group,
        **{
            f"MODEL.WS.{part}": formula
            for part, formula in weights.ws.items()
            if any(name.startswith(_CONVOLUTIONS[part]) for name in weights.state)
        },
    }


def check_keys(source: str, weights: Weights, cfg: Any, *, allow_partial: bool, norms: bool) -> None:
    """Compare what the weights state with the config's keys: norms if ``norms``, WS unless ``allow_partial``.

    Raises:
        WeightsError: they differ; the message names all keys to set.
    """
    needs, norms = _needed_keys(weights), norms and bool(weights.architecture.blocks)
    if norms:
        needs |= {key: get_value(weights.config, key) for key in NORM_KEYS}
    skip = ("MODEL.WS.",) if allow_partial else ()
    if not norms or "GN" not in [get_value(cfg, key) for key in NORM_KEYS]:
        skip = (*skip, "MODEL.GN.")
    wrong = {}
    for key, need in needs.items():
        have = get_value(cfg, key)
        if have is None and key.startswith("MODEL.WS."):
            have = ""  # a config of Detectron2's own keys standardizes no weights
        if not key.startswith(skip) and None not in (need, have) and _differ(key, need, have):
            wrong[key] = show(have), show(need)
    if wrong:
        now = ", ".join(f"{key} is {have}" for key, (have, _) in wrong.items())
        sets = " ".join(f"{key} {need}" for key, (_, need) in wrong.items())
        kind = ", ".join(filter(None, (weights.kind, weights.norm)))
        raise WeightsError(f"{source}: {now}, but these weights ({kind}) need: {sets}")


def _differ(key: str, need: Any, have: Any) -> bool:
    if key in NORM_KEYS:  # others have other tensors
        return need != have and need in _SAME_TENSORS and have in _SAME_TENSORS
    if key.startswith("MODEL.WS."):  # these differ in epsilon alone
        return need != have and {need, have} != {"bit", "timm"}
    return not close(need, have) if isinstance(need, tuple) else bool(need != have)


def describe(path_or_uri: str) -> list[str]:
    """Return lines about the content of a weights file and the config keys it needs.

    Raises:
        WeightsError: unreadable.
    """
    weights = open_weights(path_or_uri, must_know=False)
    path, state, found, norm = local_path(path_or_uri), weights.state, weights.architecture, weights.bottom_up_norm
    kind = (weights.kind, found.resnet, _NORM_NAMES.get(norm, norm) if found.blocks else "")
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    parts = Counter(map(part_of, state))
    names = f": {some(weights.class_names)}" if weights.class_names else ""
    steps = weights.meta["provenance"] if weights.meta else []
    folded = "; order and std are folded into the stem on load" if weights.foldable else ""
    ask = "; append ?preprocessing=caffe or ?preprocessing=torch to the name" if weights.asks else ""
    clips = any(v.dim() == 5 for v in state.values())
    rows = {
        "file": f"{os.path.getsize(path) / 1e6:.1f} MB, sha256 {sha256_of(path)}",
        "holds": one_line(", ".join(filter(None, kind))),
        "tensors": f"{len(state)}, {sum(v.numel() for v in state.values()) / 1e6:.1f} M numbers, {', '.join(dtypes)}",
        "parts": ", ".join(f"{part} {parts[part]}" for part in PARTS if parts[part]),
        "classes": f"{weights.num_classes}{names}" if weights.num_classes else "",
        "goes into": "gn-det predict on videos"
        if clips
        else _STYLES[found.style][0] or "a backbone: backbone.bottom_up with FPN, backbone and roi_heads.res5 without"
        if found.blocks
        else "no known model",
        "preprocessing": expects(weights.preprocessing) + folded if weights.preprocessing else f"unknown{ask}",
        "config keys": "" if clips else _keys(weights),
        "not used": some(weights.ignored),
        "provenance": " -> ".join(map(_step, steps)),
    }
    return [path_or_uri, *(f"  {name:14s}{value}" for name, value in rows.items() if value)]


def expects(needs: Preprocessing) -> str:
    """Return channel order, mean, std and stride as a sentence."""
    mean, std = (show(values) if values else "unknown" for values in (needs.pixel_mean, needs.pixel_std))
    stride = {True: "; stride in the 1x1", False: "; stride in the 3x3", None: ""}[needs.stride_in_1x1]
    return f"{needs.format or 'channel order unknown'}, mean {mean}, std {std} (of 0-255){stride}"


def _keys(weights: Weights) -> str:
    norm, found = weights.bottom_up_norm, weights.architecture
    keys: dict[str, Any] = {"MODEL.RESNETS.DEPTH": found.depth or None}
    if found.blocks:
        keys["MODEL.RESNETS.NORM"] = {"affine BN": "FrozenBN", "BN": "FrozenBN", "affine": "GN"}.get(norm, norm or "''")
    keys |= _needed_keys(weights)
    if weights.foldable:
        if keys.pop("INPUT.FORMAT") == "RGB" and keys["MODEL.PIXEL_MEAN"]:
            keys["MODEL.PIXEL_MEAN"] = keys["MODEL.PIXEL_MEAN"][::-1]
        del keys["MODEL.PIXEL_STD"]
    return " ".join(f"{key} {show(value)}" for key, value in keys.items() if value not in (None, ""))


def _step(step: dict[str, Any]) -> str:
    """Describe the source of a conversion, or a classifier of ``gn-det classify`` with its epoch and error."""
    if step.get("trained") is not True:
        return f"{one_line(step.get('source', ''), 80)} (sha256 {one_line(step.get('sha256', ''), 64)[:12]})"
    error = step.get("top1_error", step.get("val_error"))
    shown = f", top-1 error {error:.2f} %" if isinstance(error, float) else ""
    return f"{one_line(step.get('kind', ''), 80)} (epoch {one_line(step.get('epoch', '?'), 12)}{shown})"
