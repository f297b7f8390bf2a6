"""Result type shared by all formats: tensors with Detectron2's names, what the names say, and metadata of the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gn_det.checkpoint.preprocessing import Preprocessing
from gn_det.errors import WeightsError

State = dict[str, torch.Tensor]
PARTS = ("stem", "res2", "res3", "res4", "res5", "fpn", "rpn", "box head", "mask head", "res5 head", "other")
BOTTOM_UP = ("stem", "res2", "res3", "res4", "res5")
_PART_OF = (
    (re.compile(r"roi_heads\.(res5)\."), "res5 head"),
    (re.compile(r"(?:backbone\.(?:bottom_up\.)?)?(stem|res[2-5])\."), ""),  # the part is the name itself
    (re.compile(r"backbone\.(?:fpn_|top_block)"), "fpn"),
    (re.compile(r"proposal_generator\."), "rpn"),
    (re.compile(r"roi_heads\.(?:box_head|box_predictor)\."), "box head"),
    (re.compile(r"roi_heads\.mask_head\."), "mask head"),
)
_BLOCK = re.compile(r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)?res([2-5])\.(\d{1,3})\.(.+)$")
_PREDICTOR = re.compile(r"roi_heads\.box_predictor\.(?:(\d{1,3})\.)?cls_score\.")
# Blocks of res2, res3, res4 (res5 does not discriminate), bottleneck or basic -> MODEL.RESNETS.DEPTH
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2), False): 18,
    ((3, 4, 6), False): 34,
    ((3, 4, 6), True): 50,
    ((3, 4, 23), True): 101,
    ((3, 8, 36), True): 152,
}


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


def part_of(name: str) -> str:
    """Return the part (one of :data:`PARTS`) that a state-dict name belongs to."""
    for pattern, part in _PART_OF:
        if match := pattern.match(name):
            return part or str(match[1])
    return "other"


@dataclass(frozen=True)
class Architecture:
    """Facts read from a state dict with Detectron2's names."""

    depth: int  # 18, 34, 50, 101, 152, or 0 when the blocks are of no known ResNet
    blocks: tuple[int, ...]  # number of blocks in res2, res3, res4; () without any
    bottleneck: bool  # whether blocks have three convolutions
    style: str  # "FPN" or "C4" for a whole detector, "" for a bare backbone
    variant: str  # "v1" (post-activation), "bit" or "v2d" (see gn_det.modeling.resnet_v2), "" without a backbone
    stages: int | None  # of Cascade R-CNN's box heads, 0 for a plain one; None without any
    norm: str  # "BN" (with running statistics), "affine" (scale and shift alone: GN, LN, IN or folded BN), "" (none)

    @property
    def resnet(self) -> str:
        """Name of the ResNet; "" without blocks."""
        if self.depth or not self.blocks:
            return f"ResNet-{self.depth}" if self.depth else ""
        kind = "bottleneck" if self.bottleneck else "basic"
        return f"a ResNet of {list(self.blocks)} {kind} blocks in res2, res3, res4"


def architecture_of(names: Iterable[str]) -> Architecture:
    """Read the architecture from tensor names (``backbone.``-prefixed or bare ``stem.``/``res2.`` names)."""
    names = list(names)

    def has(prefix: str | tuple[str, ...]) -> bool:
        return any(name.startswith(prefix) for name in names)

    inner = [match.groups() for name in names if (match := _BLOCK.match(name))]
    counts = tuple(max((int(b) + 1 for s, b, _ in inner if s == stage), default=0) for stage in "234")
    leaves = {rest for _, _, rest in inner}
    bottleneck = any(leaf.startswith("conv3.") for leaf in leaves)
    style = "FPN" if has("backbone.bottom_up.") else "C4" if has(("backbone.res", "backbone.stem")) else ""
    norm = "affine" if any(leaf.endswith("norm.weight") for leaf in leaves) else ""
    norm = "BN" if any(leaf.endswith("norm.running_var") for leaf in leaves) else norm
    heads = {match[1] for name in names if (match := _PREDICTOR.match(name))}
    stages = len(heads - {None}) if heads else None
    variant = "v1" if inner else ""
    if any(leaf.startswith("norm.") for leaf in leaves):
        variant = "v2d" if any(".stem.conv2." in f".{name}" for name in names) else "bit"
    depth = _DEPTHS.get((counts, bottleneck), 0)
    return Architecture(depth, counts if inner else (), bottleneck, style, variant, stages, norm)


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

    @cached_property
    def architecture(self) -> Architecture:
        """Depth, style and norm, read from the names."""
        return architecture_of(self.state)

    @property
    def bottom_up_norm(self) -> str:
        """Norm of the bottom-up network as the file states it, or else as its names do."""
        return self.norm or self.architecture.norm

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
            found = state[name].shape[0] if state[name].dim() else "no"
            if found != per_class * rows:
                wanted = f"{per_class * rows} would belong to the {rows} classes of cls_score"
                raise WeightsError(f"{name}: has {found} rows, {wanted}; class-agnostic boxes and masks are not read")
            state[name] = state[name][per_class:]
        name = box + "cls_score." + leaf
        if name in state and state[name].dim():
            state[name] = state[name].roll(-1, 0)
