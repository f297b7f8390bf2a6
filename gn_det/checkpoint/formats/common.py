"""What every format gives: tensors under Detectron2's names, and what else the file says about them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gn_det.checkpoint.preprocessing import Preprocessing
from gn_det.errors import WeightsError

State = dict[str, torch.Tensor]


class NameTable:
    """Table of tensor names: called with a foreign name, it returns Detectron2's, or None when no row matches.

    A row is a pattern of the whole foreign name, and Detectron2's name as a template (``res\\1.weight``) or a function
    of the match. The first row that matches decides.
    """

    def __init__(self, *rows: tuple[str, str | Callable[[re.Match[str]], str]]) -> None:
        self._rows = [(re.compile(pattern), ours) for pattern, ours in rows]

    def __call__(self, name: str) -> str | None:
        for pattern, ours in self._rows:
            if match := pattern.fullmatch(name):
                return match.expand(ours) if isinstance(ours, str) else ours(match)
        return None


@dataclass
class Weights:
    """A weights file after translation; what the source does not say is None or empty.

    Attributes:
        state: tensors by Detectron2's names, of a whole model (``backbone.bottom_up.res2...``) or of a bare backbone
            (``res2...``). Names that no table knows stay as they were and end up as unexpected.
        norm: norm of the bottom-up network: "GN", "LN", "IN", "BN" (with statistics), "affine BN" (folded into scale
            and shift); "" = read it from the names.
        foldable: the stem convolution may be rewritten for the config's channel order and std, because the source has
            another convention than Detectron2.
        asks: the preprocessing is unknown and decides the numbers, so the user must say it.
        aside: the ignored ImageNet classifier by Detectron2's names (``stem.fc.weight``), so that conversion keeps it.
    """

    state: State
    kind: str  # what the file is, for people
    norm: str = ""
    groups: tuple[int, int] | None = None  # GN's NUM_GROUPS and CHANNELS_PER_GROUP
    ignored: tuple[str, ...] = ()  # names that are known and not meant for a detector
    preprocessing: Preprocessing | None = None
    config: dict[str, Any] | None = None  # that the weights were trained with
    meta: dict[str, Any] | None = None  # see gn_det.checkpoint.meta.read_meta
    foldable: bool = False
    asks: bool = False
    aside: State = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences worth showing the user
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of a detector's classes, 0 if unknown."""
        names = ("box_predictor.cls_score", 1), ("box_predictor.0.cls_score", 1), ("mask_head.predictor", 0)
        for name, others in names:
            rows = self.state.get(f"roi_heads.{name}.weight")
            if rows is not None and rows.dim():
                return rows.shape[0] - others
        return len(self.class_names)


def classes_last(state: State) -> None:
    """Move background from the first row to the last (scores) or drop it (boxes, masks), in place.

    Raises:
        WeightsError: rows that do not belong to one number of classes.
    """
    box, mask = "roi_heads.box_predictor.", "roi_heads.mask_head.predictor."
    scores = state.get(box + "cls_score.weight")
    if scores is None or not scores.dim():
        return
    rows = scores.shape[0]
    for leaf in ("weight", "bias"):
        for name, per_class in ((box + "bbox_pred." + leaf, 4), (mask + leaf, 1)):
            if name not in state:
                continue
            found = state[name].shape[0] if state[name].dim() else 0
            if found != per_class * rows:
                raise WeightsError(
                    f"{name}: has {found} rows, {per_class * rows} would belong to the {rows} classes of cls_score; "
                    "class-agnostic boxes and masks are not read"
                )
            state[name] = state[name][per_class:]
        name = box + "cls_score." + leaf
        if name in state and state[name].dim():
            state[name] = state[name].roll(-1, 0)
