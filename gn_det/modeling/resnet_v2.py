"""Pre-activation ResNets (He et al. 2016b) as bottom-up networks: Big Transfer's (BiT) and timm's ``resnetv2_50d``.

A block normalizes its input first, and the sum of branch and shortcut is left as it is. The features are these sums, as
in timm; the norm after the last block belongs to the classifier. A norm that follows a convolution is nested in it, as
in :class:`gn_det.modeling.resnet.ResNet`; the first norm of a block is ``norm``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.errors import ConfigError
from gn_det.modeling.layers import ConvNorm, FeatureSpec, c2_msra_fill
from gn_det.modeling.resnet import BLOCKS_PER_STAGE, STAGES, ResNet, freeze
from gn_det.norm import NormFactory, NormSpec, get_norm, is_scripting, norm_act

#: Values of MODEL.RESNETS.VARIANT of pre-activation networks.
VARIANTS = ("bit", "v2d")


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: NormSpec, *, stride: int = 1) -> ConvNorm:
    """A convolution without a norm, whose weights are standardized where ``norm`` says so."""
    conv = ConvNorm(in_channels, out_channels, kernel_size=kernel_size, stride=stride, padding=kernel_size // 2)
    conv.ws = norm.ws if isinstance(norm, NormFactory) else ""
    return conv


class BitStem(nn.Module):
    """7x7 convolution of stride 2, and 3x3 max pooling of stride 2 over maps padded with zeros."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormSpec) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, ceil(H / 4), ceil(W / 4))."""
        # The maps have negative values, so zeros at the border are not the same as no border.
        return F.max_pool2d(F.pad(self.conv1(x), (1, 1, 1, 1)), kernel_size=3, stride=2)


class DeepStem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, norm and ReLU after the first two; 3x3 max pooling of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormSpec) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = ConvNorm(in_channels, half, kernel_size=3, stride=2, padding=1, norm=norm, relu=True)
        self.conv2 = ConvNorm(half, half, kernel_size=3, padding=1, norm=norm, relu=True)
        self.conv3 = _conv(half, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, ceil(H / 4), ceil(W / 4))."""
        return F.max_pool2d(self.conv3(self.conv2(self.conv1(x))), kernel_size=3, stride=2, padding=1)


class PreActBottleneck(nn.Module):
    """Norm and ReLU, then 1x1, 3x3, 1x1 convolutions; the shortcut starts after the first ReLU where channels change.

    Args:
        in_channels, out_channels: of the block.
        width: channels of the 3x3 convolution.
        stride: of the 3x3 convolution.
        norm: see :data:`gn_det.norm.NormSpec`; one is needed.
        average: the shortcut averages 2x2 cells instead of striding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, width: int, stride: int, norm: NormSpec, average: bool
    ) -> None:
        super().__init__()
        first = get_norm(norm, in_channels)
        if first is None:
            raise ConfigError("MODEL.RESNETS.NORM '': a pre-activation ResNet needs a norm, such as GN")
        self.norm = first
        self.pool_stride = stride if average else 1
        self.shortcut: ConvNorm | None = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=1 if average else stride)
        self.conv1 = ConvNorm(in_channels, width, kernel_size=1, norm=norm, relu=True)
        self.conv2 = ConvNorm(width, width, kernel_size=3, stride=stride, padding=1, norm=norm, relu=True)
        self.conv3 = _conv(width, out_channels, 1, norm)

    @property
    def ws(self) -> str:
        """Formula of Weight Standardization of the block, "" for none."""
        return self.conv1.ws

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        if not is_scripting():
            y = norm_act(self.norm, x, relu=True)
        else:
            y = F.relu(self.norm(x))
        if self.shortcut is not None:
            pooled = y
            if self.pool_stride > 1:
                pooled = F.avg_pool2d(y, 2, self.pool_stride, ceil_mode=True, count_include_pad=False)
            x = self.shortcut(pooled)
        out: Tensor = self.conv3(self.conv2(self.conv1(y)), x)
        return out


class ResNetV2(ResNet):
    """Pre-activation ResNet; the same features, freezing and forward pass as ResNet.

    Args:
        variant: "bit": a 7x7 convolution and zeros around the maps before pooling; "v2d": three 3x3 convolutions, and
            shortcuts that average.
        depth: 50, 101 or 152.
        out_features, in_channels, stem_channels, res2_channels, width_per_group, norm, freeze_at, recompute: see
            :class:`gn_det.modeling.resnet.ResNet`.
    """

    def __init__(
        self,
        *,
        variant: str,
        depth: int = 50,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
        stem_channels: int = 64,
        res2_channels: int = 256,
        width_per_group: int = 64,
        norm: NormSpec = "GN",
        freeze_at: int = 0,
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.recompute = recompute
        if variant not in VARIANTS:
            raise ConfigError(f"MODEL.RESNETS.VARIANT {variant!r}: use one of {', '.join(VARIANTS)}")
        self.out_features = tuple(out_features)
        stem = BitStem if variant == "bit" else DeepStem
        self.stem = stem(in_channels, stem_channels, norm)  # type: ignore[assignment]
        specs = {"stem": FeatureSpec(stem_channels, 4)}
        self.stage_names = STAGES[1 : max(STAGES.index(f) for f in out_features) + 1]
        channels = stem_channels
        for k, name in enumerate(self.stage_names):
            out_channels, blocks = res2_channels * 2**k, []
            for number in range(BLOCKS_PER_STAGE[depth][k]):
                stride = 2 if k and number == 0 else 1
                width, average = width_per_group * 2**k, variant == "v2d"
                block = PreActBottleneck(channels, out_channels, width=width, stride=stride, norm=norm, average=average)
                blocks.append(block)
                channels = out_channels
            self.add_module(name, nn.Sequential(*blocks))
            specs[name] = FeatureSpec(out_channels, 4 * 2**k)
        for module in self.modules():
            if isinstance(module, ConvNorm):
                c2_msra_fill(module)
        self.feature_specs = {name: specs[name] for name in self.out_features}
        for name in ("stem", *self.stage_names)[: max(freeze_at, 0)]:
            freeze(getattr(self, name))
