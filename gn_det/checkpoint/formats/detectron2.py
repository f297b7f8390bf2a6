"""Checkpoints of Detectron2 and our own, which need no renaming."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from gn_det.checkpoint.formats.common import State, Weights
from gn_det.checkpoint.preprocessing import Preprocessing

KIND = "Detectron2 checkpoint"
_KNOWN = re.compile(r"(?:backbone\.(?:bottom_up\.)?)?(?:stem\.conv1|res[2-5]\.\d+)\.")
# Old constants and the ImageNet classifier: present in files, but not weights of a detector.
_IGNORED = re.compile(r"(?:.*\.)?(?:pixel_mean|pixel_std)$|.*cell_anchors|(?:stem\.)?(?:fc|linear)\.(?:weight|bias)$")


def recognizes(names: Collection[str]) -> bool:
    return any(_KNOWN.match(name) for name in names)


def translate(state: State, payload: Mapping[str, Any]) -> Weights:
    """Return a detector or bare backbone, with the preprocessing if the file stores its constants."""
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    needs = None
    if mean is not None and std is not None and mean.numel() == std.numel() == 3:
        needs = Preprocessing(pixel_mean=tuple(map(float, mean.flatten())), pixel_std=tuple(map(float, std.flatten())))
    ignored = tuple(name for name in state if _IGNORED.match(name))
    kept = {name: value for name, value in state.items() if not _IGNORED.match(name)}
    aside = {name: state[name] for name in ignored if name.startswith("stem.fc.")}
    return Weights(kept, KIND, ignored=ignored, preprocessing=needs, aside=aside)
