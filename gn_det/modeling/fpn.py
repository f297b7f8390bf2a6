"""Feature Pyramid Network (Lin et al. 2017) on a bottom-up network, norm after every convolution, no ReLU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.errors import ConfigError
from gn_det.modeling.layers import ConvNorm, FeatureSpec, c2_xavier_fill
from gn_det.modeling.resnet import ResNet
from gn_det.norm import NormSpec


class FPN(nn.Module):
    """Pyramid levels p<k> of stride 2^k from the bottom-up features, and one more by subsampling the last.

    Args:
        bottom_up: network with ``feature_specs``, unless ``specs`` gives them.
        in_features: its features from fine to coarse, strides doubling.
        out_channels: channels of every level.
        norm: of lateral and output convolutions, see :data:`gn_det.norm.NormSpec`; without one they have biases.
        fuse_type: "sum" or "avg" of the lateral and the top-down feature.
        specs: channels and stride of what ``bottom_up`` makes, by name.
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        *,
        in_features: Sequence[str],
        out_channels: int,
        norm: NormSpec = None,
        fuse_type: str = "sum",
        specs: Mapping[str, FeatureSpec] | None = None,
    ) -> None:
        super().__init__()
        specs = cast("Mapping[str, FeatureSpec]", bottom_up.feature_specs) if specs is None else specs
        if fuse_type not in ("sum", "avg"):
            raise ConfigError(f"MODEL.FPN.FUSE_TYPE {fuse_type!r}: use 'sum' or 'avg'")
        missing = [f for f in in_features if f not in specs]
        if missing or not in_features:
            made = ", ".join(specs)
            maker = "MODEL.RESNETS.OUT_FEATURES" if isinstance(bottom_up, ResNet) else type(bottom_up).__name__
            raise ConfigError(f"MODEL.FPN.IN_FEATURES {list(in_features)}: {maker} makes {made}")
        strides = [specs[f].stride for f in in_features]
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ConfigError(f"MODEL.FPN.IN_FEATURES {list(in_features)}: strides {strides} must double each time")
        self.in_features = tuple(in_features)
        self.average = fuse_type == "avg"
        self.levels = [int(math.log2(s)) for s in strides]
        for feature, level in zip(in_features, self.levels):
            channels = specs[feature].channels
            lateral = ConvNorm(channels, out_channels, kernel_size=1, bias=not norm, norm=norm)
            output = ConvNorm(out_channels, out_channels, kernel_size=3, padding=1, bias=not norm, norm=norm)
            c2_xavier_fill(lateral)
            c2_xavier_fill(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        # Registered last, as in Detectron2: the order of parameters is that of its optimizer states.
        self.bottom_up = bottom_up
        self.size_divisibility = strides[-1]
        top = self.levels[-1] + 1
        self.feature_specs = {f"p{k}": FeatureSpec(out_channels, 2**k) for k in [*self.levels, top]}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W), H and W multiples of ``size_divisibility``, to {"p2": ..., ...}, fine to coarse."""
        outputs = self.pyramid(self.bottom_up(x))
        outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return dict(zip(self.feature_specs, outputs))

    def pyramid(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The levels that have a bottom-up feature of their own, fine to coarse."""
        outputs: list[Tensor] = []
        merged: Tensor | None = None
        for feature, level in zip(reversed(self.in_features), reversed(self.levels)):
            above = None if merged is None else F.interpolate(merged, scale_factor=2.0, mode="nearest")
            lateral = getattr(self, f"fpn_lateral{level}")(features[feature], above)
            if above is not None and self.average:
                lateral /= 2
            merged = lateral
            outputs.append(getattr(self, f"fpn_output{level}")(merged))
        outputs.reverse()
        return outputs
