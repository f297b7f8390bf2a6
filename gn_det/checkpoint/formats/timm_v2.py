"""timm's pre-activation ResNets: ``resnetv2_*_bit`` (BiT) and ``resnetv2_50d_gn``.

The norm before a convolution is ours of the convolution before it, or ``norm`` of the block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gn_det.checkpoint.formats.common import NameTable, State, Weights
from gn_det.checkpoint.preprocessing import Preprocessing
from gn_det.errors import WeightsError

_BLOCK = r"stages\.([0-3])\.blocks\.(\d+)\."
_LEAF = r"\.(weight|bias)"
#: Mean and standard deviation of these models, on the scale of 0 to 255.
_HALF = (127.5, 127.5, 127.5)

map_name = NameTable(
    (r"stem\.conv\.weight", "stem.conv1.weight"),
    (r"stem\.conv([123])\.weight", r"stem.conv\1.weight"),
    (rf"stem\.norm([12]){_LEAF}", r"stem.conv\1.norm.\2"),
    (rf"{_BLOCK}norm1{_LEAF}", lambda m: f"res{int(m[1]) + 2}.{m[2]}.norm.{m[3]}"),
    (rf"{_BLOCK}norm([23]){_LEAF}", lambda m: f"res{int(m[1]) + 2}.{m[2]}.conv{int(m[3]) - 1}.norm.{m[4]}"),
    (rf"{_BLOCK}conv([123])\.weight", lambda m: f"res{int(m[1]) + 2}.{m[2]}.conv{m[3]}.weight"),
    (rf"{_BLOCK}downsample\.conv\.weight", lambda m: f"res{int(m[1]) + 2}.{m[2]}.shortcut.weight"),
)


def recognizes(names: Collection[str]) -> bool:
    return any(name.startswith("stages.0.blocks.0.norm1.") for name in names)


def translate(state: State, payload: Mapping[str, Any]) -> Weights:
    """A bare backbone; BiT's is known by its stem and has standardized weights.

    Raises:
        WeightsError: a model with BatchNorm.
    """
    if any(name.endswith("running_mean") for name in state):
        raise WeightsError("holds a pre-activation ResNet with BatchNorm, which is not read; give one with GroupNorm")
    classifier = ("norm.", "head.")
    kept = {map_name(name) or name: value for name, value in state.items() if not name.startswith(classifier)}
    bit = "stem.conv.weight" in state
    return Weights(
        kept,
        "timm's BiT backbone" if bit else "timm's pre-activation backbone",
        "GN",
        (32, 0),
        ignored=tuple(name for name in state if name.startswith(classifier)),
        preprocessing=Preprocessing("RGB", _HALF, _HALF, stride_in_1x1=False),
        ws={"RESNETS": "timm" if bit else ""},
    )
