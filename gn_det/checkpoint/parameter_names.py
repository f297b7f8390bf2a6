"""Read the part of the model, and depth, style and norm of the network, from Detectron2's tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

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
