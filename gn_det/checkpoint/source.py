"""What every reader of the outside world hands on: tensors under Detectron2's names, and what comes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Preprocessing:
    """What weights expect of their input and of the network; None where the source does not tell.

    Attributes:
        format: channel order, "BGR" or "RGB".
        pixel_mean, pixel_std: per channel in that order, in 0-255 units.
        stride_in_1x1: whether a bottleneck strides in its first 1x1 convolution (else in the 3x3).
    """

    format: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    stride_in_1x1: bool | None = None


@dataclass
class Weights:
    """A weights file after translation.

    Attributes:
        state: tensors by Detectron2's names, of a whole model (``backbone.bottom_up.res2...``) or of a bare backbone
            (``res2...``). Names that no table knows stay as they were and end up as unexpected.
        kind: what the file is, for people.
        norm: norm of the bottom-up network where the source tells: "GN", "LN", "IN", "BN" (with statistics),
            "affine BN" (folded into scale and shift); "" = read it from the names.
        groups: GN's (NUM_GROUPS, CHANNELS_PER_GROUP) where the source tells.
        ignored: names that are known and not meant for a detector.
        config: the configuration the weights were trained with, as nested dicts; None when the file has none.
        meta: the ``gn_det`` block, see :func:`gn_det.checkpoint.meta.read_meta`.
    """

    state: dict[str, torch.Tensor]
    kind: str
    norm: str = ""
    groups: tuple[int, int] | None = None
    ignored: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    config: dict[str, Any] | None = None
    meta: dict[str, Any] | None = None
