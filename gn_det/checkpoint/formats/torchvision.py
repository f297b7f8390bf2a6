"""ResNets named ``conv1 layer1 ... layer4 fc``: torchvision's, timm's, and the backbones of mmdetection.

torchvision names every norm ``bn``, so a ResNet built with ``norm_layer=partial(nn.GroupNorm, 32)`` is recognized only
by its lack of running statistics. mmdetection names GroupNorm ``gn``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from gn_det.checkpoint.formats.common import NameTable, State, Weights
from gn_det.checkpoint.preprocessing import TORCH

_LEAF = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK = r"layer([1-4])\.(\d+)\."


def _in_block(rest: str) -> Any:
    return lambda m: m.expand(rf"res{int(m[1]) + 1}.\2.{rest}")


map_name = NameTable(
    (r"conv1\.weight", "stem.conv1.weight"),
    (rf"(?:bn|gn)1{_LEAF}", r"stem.conv1.norm.\1"),
    (rf"{_BLOCK}conv([123])\.weight", _in_block(r"conv\3.weight")),
    (rf"{_BLOCK}(?:bn|gn)([123]){_LEAF}", _in_block(r"conv\3.norm.\4")),
    (rf"{_BLOCK}downsample\.0\.weight", _in_block("shortcut.weight")),
    (rf"{_BLOCK}downsample\.1{_LEAF}", _in_block(r"shortcut.norm.\3")),
)


def _block_back(match: re.Match[str]) -> str:
    stage, block, conv, norm, leaf = match.groups()
    module = f"downsample.{1 if norm else 0}" if conv == "shortcut" else conv.replace("conv", "bn") if norm else conv
    return f"layer{int(stage) - 1}.{block}.{module}.{leaf}"


#: torchvision's and timm's name for a backbone-relative name of ours.
name_back = NameTable(
    (r"res([2-5])\.(\d+)\.(conv[123]|shortcut)\.(norm\.)?(\w+)", _block_back),
    (r"stem\.conv1\.norm\.(\w+)", r"bn1.\1"),
    (r"stem\.(conv1|fc)\.(\w+)", r"\1.\2"),
)


def recognizes(names: Collection[str]) -> bool:
    return "conv1.weight" in names and any(name.startswith("layer1.0.conv1.") for name in names)


def translate(state: State, payload: Mapping[str, Any]) -> Weights:
    """Translate a classification ResNet to bare names (``res2.0.conv1.weight``).

    Those of torchvision and timm expect RGB with ImageNet's mean and std, which is folded on load. mmdetection's use
    either convention, and their files do not say which.
    """
    ignored = tuple(name for name in state if name in ("fc.weight", "fc.bias"))
    kept = {map_name(name) or name: value for name, value in state.items() if name not in ignored}
    aside = {f"stem.{name}": state[name] for name in ignored}
    if "gn1.weight" in state:  # mmdetection names norms by type; torchvision and timm always use bn
        return Weights(kept, "mmdetection backbone", "GN", (32, 0), ignored, foldable=True, aside=aside)
    return Weights(kept, "torchvision or timm ResNet", ignored=ignored, preprocessing=TORCH, foldable=True, aside=aside)
