"""Result type shared by all formats: tensors with Detectron2's names, and metadata of the file."""

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
    """Table of tensor names: call it with a foreign name to get Detectron2's, or None if no row matches.

    A row has a pattern for the full foreign name, and Detectron2's name as a template (``res\\1.weight``) or a function
    of the match. The first matching row wins.
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
    """A translated weights file; what the source does not state is None or empty."""

    #: tensors with Detectron2's names, of a full model (``backbone.bottom_up.res2...``) or a bare backbone
    #: (``res2...``). Unknown names are kept and reported as unexpected.
    state: State
    kind: str  # what the file is, for people
    #: norm of the bottom-up network: "GN", "LN", "IN", "BN" (with statistics), "affine BN" (folded into scale and
    #: shift); "" to read it from the names
    norm: str = ""
    groups: tuple[int, int] | None = None  # GN's NUM_GROUPS and CHANNELS_PER_GROUP
    ignored: tuple[str, ...] = ()  # names that are known and not meant for a detector
    preprocessing: Preprocessing | None = None
    config: dict[str, Any] | None = None  # training config of the weights
    meta: dict[str, Any] | None = None  # see gn_det.checkpoint.meta.read_meta
    #: whether the stem convolution may be rewritten for the config's channel order and std, because the source's
    #: convention differs from Detectron2's
    foldable: bool = False
    #: the ignored ImageNet classifier with Detectron2's names (``stem.fc.weight``), kept by conversion
    aside: State = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences worth showing the user
    class_names: tuple[str, ...] = ()
    #: formula of Weight Standardization of each part, "" for none, such as {"RESNETS": "jhu"}; parts that the
    #: source does not state are left out
    ws: dict[str, str] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether the user must state the preprocessing, because it is unknown and not Detectron2's."""
        return self.preprocessing is None and (self.foldable or bool(self.ws.get("RESNETS")))

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
        WeightsError: the numbers of rows imply different numbers of classes.
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
                wanted = f"{per_class * rows} would belong to the {rows} classes of cls_score"
                raise WeightsError(f"{name}: has {found} rows, {wanted}; class-agnostic boxes and masks are not read")
            state[name] = state[name][per_class:]
        name = box + "cls_score." + leaf
        if name in state and state[name].dim():
            state[name] = state[name].roll(-1, 0)
