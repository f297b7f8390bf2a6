"""ResNets named ``conv1 layer1 ... layer4 fc``: torchvision's, timm's, and the backbones of mmdetection.

The table, with N = 1, 2, 3 and S = 1 ... 4:

==================================  ==========================
theirs                              ours
==================================  ==========================
``conv1``                           ``stem.conv1``
``bn1``, mmdetection also ``gn1``   ``stem.conv1.norm``
``layerS.B.convN``                  ``res(S+1).B.convN``
``layerS.B.bnN``, ``.gnN``          ``res(S+1).B.convN.norm``
``layerS.B.downsample.0``           ``res(S+1).B.shortcut``
``layerS.B.downsample.1``           ``res(S+1).B.shortcut.norm``
``fc``                              ``stem.fc`` (set aside)
==================================  ==========================

torchvision names a norm ``bn`` whatever it is, so a ResNet built with ``norm_layer=partial(nn.GroupNorm, 32)`` tells
its norm only by having no running statistics.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gn_det.checkpoint.source import TORCH, Row, State, Weights, first_match

_LEAF = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$"
# THE table. Anchored: the backbone of a detector comes without its prefix.
_TABLE: tuple[Row, ...] = (
    (re.compile(r"conv1\.weight$"), lambda m: "stem.conv1.weight"),
    (re.compile(rf"(?:bn|gn)1{_LEAF}"), lambda m: f"stem.conv1.norm.{m[1]}"),
    (
        re.compile(r"layer([1-4])\.(\d+)\.conv([123])\.weight$"),
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.weight",
    ),
    (
        re.compile(rf"layer([1-4])\.(\d+)\.(?:bn|gn)([123]){_LEAF}"),
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}",
    ),
    (
        re.compile(r"layer([1-4])\.(\d+)\.downsample\.0\.weight$"),
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.weight",
    ),
    (
        re.compile(rf"layer([1-4])\.(\d+)\.downsample\.1{_LEAF}"),
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}",
    ),
)
_CLASSIFIER = re.compile(r"fc\.(weight|bias)$")
_BLOCK = re.compile(r"res([2-5])\.(\d+)\.(conv[123]|shortcut)\.(norm\.)?(\w+)$")
_STEM = {"stem.conv1.": "conv1.", "stem.conv1.norm.": "bn1.", "stem.fc.": "fc."}


def map_name(name: str) -> str | None:
    """Detectron2's backbone-relative name, or None when no row of the table knows it."""
    return first_match(_TABLE, name)


def name_back(name: str) -> str | None:
    """torchvision's and timm's name for a backbone-relative name of ours; None when they have none."""
    match = _BLOCK.match(name)
    if match:
        stage, block, conv, norm, leaf = match.groups()
        module = (
            f"downsample.{1 if norm else 0}" if conv == "shortcut" else conv.replace("conv", "bn" if norm else "conv")
        )
        return f"layer{int(stage) - 1}.{block}.{module}.{leaf}"
    head, dot, leaf = name.rpartition(".")
    return _STEM[head + dot] + leaf if head + dot in _STEM else None


def looks_like_backbone(names: Collection[str]) -> bool:
    return "conv1.weight" in names and any(name.startswith("layer1.0.conv1.") for name in names)


def is_mmdetections(names: Iterable[str]) -> bool:
    """mmdetection numbers its norms by their kind (``gn1``); torchvision and timm always say ``bn``."""
    return "gn1.weight" in set(names)


def translate(state: State, payload: Mapping[str, Any]) -> Weights:
    """A classification ResNet, by bare names (``res2.0.conv1.weight``).

    torchvision's and timm's expect RGB with ImageNet's mean and std, which is folded on load. mmdetection's come in
    both conventions and their files do not tell which.
    """
    ignored = tuple(name for name in state if _CLASSIFIER.match(name))
    kept = {map_name(name) or name: value for name, value in state.items() if name not in set(ignored)}
    aside = {f"stem.{name}": state[name] for name in ignored}
    if is_mmdetections(state):
        return Weights(kept, "mmdetection backbone", "GN", (32, 0), ignored, foldable=True, asks=True, aside=aside)
    return Weights(kept, "torchvision or timm ResNet", ignored=ignored, preprocessing=TORCH, foldable=True, aside=aside)
