"""Augmentation presets of ``--augment``, as sets of keys."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from fvcore.common.config import CfgNode as CN

from gn_det.config.load import merge_overrides
from gn_det.config.schema import KEYS
from gn_det.errors import ConfigError
from gn_det.text import shown

#: Keys of each preset; :func:`apply_augmentation` adds those that depend on the config.
_PRESETS: dict[str, dict[str, Any]] = {
    "none": {"INPUT.RANDOM_FLIP": "none"},
    "light": {"INPUT.COLOR_JITTER": (0.1, 0.1, 0.1, 0.0)},
    "strong": {
        "INPUT.COLOR_JITTER": (0.3, 0.3, 0.3, 0.02),
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.TYPE": "relative_range",
        "INPUT.CROP.SIZE": [0.6, 0.6],
        "INPUT.ROTATION": 10.0,
    },
    "lsj": {"INPUT.LSJ.ENABLED": True, "INPUT.LSJ.SCALE": (0.1, 2.0)},
}
AUGMENTATIONS = tuple(_PRESETS)
#: Keys that a preset sets to their defaults, unless it names them.
_RESET = (
    *("INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.RANDOM_FLIP", "INPUT.CROP.ENABLED", "INPUT.LSJ.ENABLED"),
    *("INPUT.ROTATION", "INPUT.COLOR_JITTER"),
)
#: Smallest shorter side relative to the largest of MIN_SIZE_TRAIN.
_SMALLEST = {"light": 0.8, "strong": 0.5}


def apply_augmentation(cfg: CN, name: str, literal: Collection[str] = ()) -> None:
    """Replace the augmentation of ``cfg`` by the preset ``name``, or raise ConfigError if there is none.

    Keys in ``literal`` are the user's and are kept; the preset then varies the size around INPUT.MIN_SIZE_TRAIN.
    """
    if name not in _PRESETS:
        raise ConfigError(f"augment: unknown preset {shown(name)}; known are {', '.join(_PRESETS)}")
    side = max(cfg.INPUT.MIN_SIZE_TRAIN)
    keys: dict[str, Any] = {
        **{key: KEYS[key].default for key in _RESET},
        "INPUT.LSJ.SIZE": 32 * math.ceil(1.28 * side / 32),  # 1024 for the published 800
        "INPUT.COPY_PASTE": 0.3 if name == "strong" and cfg.MODEL.MASK_ON else 0.0,
        **_PRESETS[name],
    }
    sizes: tuple[int, ...] = (side,)
    if name in _SMALLEST:
        sizes, keys["INPUT.MIN_SIZE_TRAIN_SAMPLING"] = (round(_SMALLEST[name] * side), side), "range"
    if "INPUT.MIN_SIZE_TRAIN_SAMPLING" in literal:
        sizes = cfg.INPUT.MIN_SIZE_TRAIN
    kept = {key: value for key, value in keys.items() if key not in literal}
    merge_overrides(cfg, kept | {"INPUT.MIN_SIZE_TRAIN": sizes}, f"augment {name}")
