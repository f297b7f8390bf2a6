"""What a set of tensor names and shapes says about the network: depth, style, norm kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gn_det.checkpoint.report import Shape

_BLOCK = re.compile(r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)?res([2-5])\.(\d{1,3})\.(.+)$")
# Blocks of res2, res3, res4 (res5 does not discriminate), bottleneck or basic -> MODEL.RESNETS.DEPTH
_DEPTHS = {
    ((2, 2, 2), False): 18,
    ((3, 4, 6), False): 34,
    ((3, 4, 6), True): 50,
    ((3, 4, 23), True): 101,
    ((3, 8, 36), True): 152,
}


@dataclass(frozen=True)
class Architecture:
    """Facts read from a state dict with Detectron2's names.

    Attributes:
        depth: 18, 34, 50, 101, 152, or 0 when the blocks are of no known ResNet.
        blocks: number of blocks in res2, res3, res4; () without any.
        bottleneck: whether blocks have three convolutions.
        style: "FPN" or "C4" for a whole detector, "" for a bare backbone.
        norm: "BN" (with running statistics), "affine" (scale and shift alone: GN, LN, IN or folded BN), "" (none).
    """

    depth: int
    blocks: tuple[int, ...]
    bottleneck: bool
    style: str
    norm: str

    @property
    def resnet(self) -> str:
        kind = "bottleneck" if self.bottleneck else "basic"
        return (
            f"ResNet-{self.depth}"
            if self.depth
            else f"a ResNet of {list(self.blocks)} {kind} blocks in res2, res3, res4"
        )


def architecture_of(shapes: Mapping[str, Shape]) -> Architecture:
    """Read the architecture from tensor names (``backbone.``-prefixed or bare ``stem.``/``res2.`` names)."""
    blocks: dict[int, int] = {}
    bottleneck = False
    norm = ""
    for name in shapes:
        match = _BLOCK.match(name)
        if not match:
            continue
        stage, index, rest = int(match.group(1)), int(match.group(2)), match.group(3)
        blocks[stage] = max(blocks.get(stage, 0), index + 1)
        bottleneck = bottleneck or rest.startswith("conv3.")
        if rest.endswith("norm.running_var"):
            norm = "BN"
        elif rest.endswith("norm.weight") and not norm:
            norm = "affine"
    counts = (blocks.get(2, 0), blocks.get(3, 0), blocks.get(4, 0))
    if any(name.startswith("backbone.bottom_up.") for name in shapes):
        style = "FPN"
    elif any(name.startswith(("backbone.res", "backbone.stem")) for name in shapes):
        style = "C4"
    else:
        style = ""
    return Architecture(_DEPTHS.get((counts, bottleneck), 0), counts if blocks else (), bottleneck, style, norm)
