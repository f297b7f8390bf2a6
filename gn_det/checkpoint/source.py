"""What every reader of the outside world hands on: tensors under Detectron2's names, and what comes with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

State = dict[str, torch.Tensor]
#: One row of a table of names: what a source calls a tensor, and what Detectron2 makes of the match.
Row = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


def first_match(table: Iterable[Row], name: str) -> str | None:
    """Detectron2's name by the first row of ``table`` that knows ``name``; None when no row does."""
    for pattern, ours in table:
        match = pattern.match(name)
        if match:
            return ours(match)
    return None


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


#: Input of Caffe's models: BGR, 0-255, mean subtracted.
CAFFE = Preprocessing("BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=False)
#: Input of torchvision's and timm's ImageNet models, in 0-255 units: mean (0.485, 0.456, 0.406) of 1 in RGB, and std.
TORCH = Preprocessing("RGB", (123.675, 116.280, 103.530), (58.395, 57.120, 57.375), stride_in_1x1=False)
#: What a user may say of a file that does not tell, as in ``MODEL.WEIGHTS r50_gn.pth?preprocessing=torch``.
PREPROCESSINGS = {"caffe": CAFFE, "torch": TORCH}


def show(values: tuple[float, ...] | list[float]) -> str:
    """Numbers as a config override takes them: ``[103.53,116.28,123.675]``."""
    return "[" + ",".join(f"{v:.8g}" for v in values) + "]"


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
        preprocessing: what the weights expect; None = unknown and unchecked.
        config: the configuration the weights were trained with, as nested dicts; None when the file has none.
        meta: the ``gn_det`` block, see :func:`gn_det.checkpoint.meta.read_meta`.
        foldable: the stem convolution may be rewritten for the config's channel order and std: the weights come from
            a world with another convention than Detectron2's, so a difference is no contradiction.
        asks: the preprocessing is unknown and decides the numbers, so the user must say it.
        aside: the ignored ImageNet classifier by Detectron2's names (``stem.fc.weight``), so that conversion keeps it.
        notes: sentences worth showing the user.
        class_names: of a detector, where the file tells.
    """

    state: State
    kind: str
    norm: str = ""
    groups: tuple[int, int] | None = None
    ignored: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    config: dict[str, Any] | None = None
    meta: dict[str, Any] | None = None
    foldable: bool = False
    asks: bool = False
    aside: State = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
