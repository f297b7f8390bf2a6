"""Check weights against the config beyond names and shapes: depth, style, norm, groups, preprocessing.

Each mismatch would load silently and train or predict badly, so it is an error that names the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gn_det.checkpoint.formats.common import Weights
from gn_det.checkpoint.open_weights import NORM_KEYS
from gn_det.checkpoint.parameter_names import Architecture
from gn_det.checkpoint.preprocessing import Preprocessing, show
from gn_det.config.defaults import get_value
from gn_det.errors import WeightsError
from gn_det.text import one_line

_STYLE_KEYS = {"FPN": "build_resnet_fpn_backbone", "C4": "build_resnet_backbone"}
# Norm of the weights -> values of MODEL.RESNETS.NORM that compute the same function.
_SUITS = {
    "GN": ("GN",),
    "LN": ("LN",),
    "IN": ("IN",),
    "affine": ("GN", "LN", "IN"),
    "BN": ("BN", "SyncBN", "FrozenBN"),
    "affine BN": ("FrozenBN",),
    "": ("",),
}
NORM_NAMES = {"affine": "GN, LN or IN", "affine BN": "BN folded into scale and shift", "": "no norm"}
# Tolerance in 0-255 units, only for the rounding of published constants.
_TOLERANCE = 0.01
_VARIANTS = {
    "v1": "a post-activation ResNet",
    "bit": "a pre-activation ResNet (BiT)",
    "v2d": "a pre-activation ResNet with a deep stem",
}


def check_architecture(source: str, found: Architecture, wanted: Architecture) -> None:
    """Compare depth and style (FPN or C4) of the file and the model; an unknown value passes."""
    if found.blocks and wanted.blocks and (found.blocks, found.bottleneck) != (wanted.blocks, wanted.bottleneck):
        advice = f"set MODEL.RESNETS.DEPTH {found.depth}" if found.depth else "take weights of that depth"
        raise WeightsError(
            f"{source}: holds {found.resnet}, but the config describes {wanted.resnet} (MODEL.RESNETS.DEPTH): "
            f"{advice}, or set MODEL.WEIGHTS to weights of the configured depth"
        )
    if found.variant and wanted.variant and found.variant != wanted.variant:
        raise WeightsError(
            f"{source}: holds {_VARIANTS[found.variant]}, but the config describes {_VARIANTS[wanted.variant]}: set "
            f"MODEL.RESNETS.VARIANT {found.variant}"
        )
    if found.style and wanted.style and found.style != wanted.style:
        raise WeightsError(
            f"{source}: holds a {found.style} detector, but the config describes a {wanted.style} one: set "
            f"MODEL.BACKBONE.NAME {_STYLE_KEYS[found.style]} (and its heads), or take weights of a {wanted.style} model"
        )


def check_stages(source: str, found: Architecture, wanted: Architecture) -> None:
    """Box heads in a row (Cascade R-CNN) of the file against the model's; unknown on either side passes."""
    theirs, ours = found.stages, wanted.stages
    if theirs is None or ours is None or theirs == ours:
        return
    set_keys = "MODEL.ROI_HEADS.NAME StandardROIHeads"
    if theirs:
        set_keys = f"MODEL.ROI_HEADS.NAME CascadeROIHeads and MODEL.ROI_BOX_CASCADE_HEAD.IOUS of {theirs} entries"
    names = [f"{n} cascade stage{'s' * (n > 1)}" if n else "no cascade" for n in (theirs, ours)]
    raise WeightsError(
        f"{source}: holds {names[0]}, but the config describes {names[1]}: set {set_keys}, or append "
        "?allow_partial=True to MODEL.WEIGHTS to start with fresh box heads"
    )


def check_norm(source: str, weights: Weights, found: Architecture, cfg: Any, allow_partial: bool) -> list[str]:
    """Check norm and groups of the bottom-up network; with ``allow_partial``, return why its norms cannot be loaded.

    Raises:
        WeightsError: the config's norm would compute something else with these weights.
    """
    wanted = get_value(cfg, "MODEL.RESNETS.NORM")
    if not found.blocks or wanted is None:
        return []
    norm = weights.norm or found.norm
    name = NORM_NAMES.get(norm, norm)
    suits = _SUITS.get(norm, ())
    if wanted not in suits:
        if allow_partial:
            return [f"these weights are {name}, MODEL.RESNETS.NORM is {wanted!r}: the backbone's norms are not loaded"]
        either = " or ".join(repr(s) for s in suits)
        raise WeightsError(
            f"{source}: these weights are {name}, but the config says {wanted!r}: set MODEL.RESNETS.NORM {either}, or "
            f"take weights trained with {wanted or 'no norm'} (scale and shift do not carry over)"
        )
    for key in NORM_KEYS:  # GN, LN and IN have the same tensors but compute different functions
        theirs, ours = get_value(weights.config, key), get_value(cfg, key)
        if theirs != ours and theirs in ("GN", "LN", "IN") and ours in ("GN", "LN", "IN"):
            raise WeightsError(
                f"{source}: was trained with {key} {theirs!r}, but the config says {ours!r}: set {key} {theirs}"
            )
    number, per_group = get_value(cfg, "MODEL.GN.NUM_GROUPS"), get_value(cfg, "MODEL.GN.CHANNELS_PER_GROUP") or 0
    if weights.groups and number is not None and any(get_value(cfg, key) == "GN" for key in NORM_KEYS):
        theirs, ours = _groups(*weights.groups), _groups(number, per_group)
        if theirs != ours:
            raise WeightsError(
                f"{source}: these weights were trained with {theirs}, the config says {ours}: set MODEL.GN.NUM_GROUPS "
                f"{weights.groups[0]} MODEL.GN.CHANNELS_PER_GROUP {weights.groups[1]}"
            )
    return []


def check_ws(source: str, weights: Weights, found: Architecture, cfg: Any) -> None:
    """Weight Standardization of each part that the file holds; what the file does not say passes.

    Raises:
        WeightsError: the config's convolutions would compute something else with these weights.
    """
    wrong = {}
    for part, formula in weights.ws.items():
        ours = get_value(cfg, f"MODEL.WS.{part}") or ""
        held = bool(found.blocks) if part == "RESNETS" else any(map(_OF_PART[part], weights.state))
        if held and formula != ours and {formula, ours} != {"bit", "timm"}:  # these differ in epsilon alone
            wrong[f"MODEL.WS.{part}"] = repr(ours), repr(formula)
    _refuse(source, weights.kind, wrong)


_OF_PART: dict[str, Callable[[str], Any]] = {
    "FPN": re.compile(r"backbone\.fpn_").match,
    "ROI_BOX_HEAD": re.compile(r"roi_heads\.box_head\.(?:\d+\.)?conv").match,
    "ROI_MASK_HEAD": re.compile(r"roi_heads\.mask_head\.mask_fcn").match,
}


def _groups(number: int, per_group: int) -> str:
    return f"{per_group} channels per group" if per_group else f"{number} groups"


def check_preprocessing(source: str, weights: Weights, cfg: Any) -> None:
    """Compare channel order, mean, std and the position of the stride with the config's.

    Raises:
        WeightsError: they differ; the message names all keys to set.
    """
    needs = weights.preprocessing or Preprocessing()
    keys = {
        "INPUT.FORMAT": needs.format,
        "MODEL.PIXEL_MEAN": needs.pixel_mean,
        "MODEL.PIXEL_STD": needs.pixel_std,
        "MODEL.RESNETS.STRIDE_IN_1X1": needs.stride_in_1x1,
    }
    wrong = {}
    for key, need in keys.items():
        have = get_value(cfg, key)
        if need is not None and have is not None and not _agree(need, have):
            wrong[key] = _show(have), _show(need)
    _refuse(source, ", ".join(filter(None, (weights.kind, weights.norm))), wrong)


def _refuse(source: str, kind: str, wrong: Mapping[str, tuple[str, str]]) -> None:
    """Raise WeightsError for keys with the value that they have and the one that weights of this kind need, if any."""
    if wrong:
        now = ", ".join(f"{key} is {have}" for key, (have, _) in wrong.items())
        sets = " ".join(f"{key} {need}" for key, (_, need) in wrong.items())
        raise WeightsError(f"{source}: {now}, but these weights ({kind}) need: {sets}")


def _agree(need: Any, have: Any) -> bool:
    if isinstance(need, tuple):
        return len(need) == len(have) and all(abs(a - b) <= _TOLERANCE for a, b in zip(need, have))
    return bool(need == have)


def _show(value: Any) -> str:
    return show(value) if isinstance(value, (tuple, list)) else one_line(value)
