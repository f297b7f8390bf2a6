"""ResNet (He et al. 2016) and ResNeXt (Xie et al. 2017) bottom-up networks.

Names, strides, fills and the order of construction are Detectron2's, so that the same seed gives the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gn_det.errors import ConfigError
from gn_det.kernels import saving
from gn_det.modeling.layers import ConvNorm, FeatureSpec, c2_msra_fill
from gn_det.norm import NormSpec, freeze_batch_norm, is_scripting

#: Residual blocks in res2 .. res5.
BLOCKS_PER_STAGE: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}

#: Names of the stem and the stages, from fine to coarse.
STAGES = ("stem", "res2", "res3", "res4", "res5")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(module: ModuleT) -> ModuleT:
    """Stop training ``module``: no parameter needs a gradient, and BatchNorm becomes FrozenBN.

    GN has no running statistics: frozen GN keeps normalizing with the statistics of each input.
    """
    for p in module.parameters():
        p.requires_grad = False
    freeze_batch_norm(module)
    return module


class BasicStem(nn.Module):
    """7x7 convolution of stride 2, norm, ReLU, 3x3 max pooling of stride 2."""

    stride = 4

    def __init__(self, *, in_channels: int = 3, out_channels: int = 64, norm: NormSpec = "BN") -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv1 = ConvNorm(in_channels, out_channels, kernel_size=7, stride=2, padding=3, norm=norm, relu=True)
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, out_channels, ceil(H / 4), ceil(W / 4))."""
        x = self.conv1(x)
        if not is_scripting():
            with saving(x):
                return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """Shared by the residual blocks, whose last convolution adds the shortcut and applies the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def _make_shortcut(self, norm: NormSpec) -> ConvNorm | None:
        if self.in_channels == self.out_channels:
            return None
        return ConvNorm(self.in_channels, self.out_channels, kernel_size=1, stride=self.stride, norm=norm)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions: the block of ResNet-18 and ResNet-34."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: NormSpec = "BN") -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = self._make_shortcut(norm)
        self.conv1 = ConvNorm(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, norm=norm, relu=True)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel_size=3, padding=1, norm=norm, relu=True)
        for conv in (self.conv1, self.conv2, self.shortcut):
            if conv is not None:
                c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        out = self.conv1(x)
        # After the branch, as in Detectron2: the gradients that meet in x are added in this order's reverse.
        y: Tensor = self.conv2(out, x if self.shortcut is None else self.shortcut(x))
        return y


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions: the block of ResNet-50 and deeper, and of ResNeXt.

    Args:
        in_channels, out_channels: ends of the block.
        bottleneck_channels: channels of the 3x3 convolution.
        stride: of the block.
        num_groups: groups of the 3x3 convolution (ResNeXt).
        stride_in_1x1: put the stride into the first 1x1 (MSRA) instead of the 3x3 (Torch, Detectron's GN weights).
        dilation: of the 3x3 convolution.
        norm: see :data:`gn_det.norm.NormSpec`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        stride_in_1x1: bool = False,
        dilation: int = 1,
        norm: NormSpec = "BN",
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = self._make_shortcut(norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.conv1 = ConvNorm(in_channels, width, kernel_size=1, stride=stride_1x1, norm=norm, relu=True)
        self.conv2 = ConvNorm(
            width,
            width,
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
            groups=num_groups,
            norm=norm,
            relu=True,
        )
        self.conv3 = ConvNorm(width, out_channels, kernel_size=1, norm=norm, relu=True)
        for conv in (self.conv1, self.conv2, self.conv3, self.shortcut):
            if conv is not None:
                c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        out = self.conv2(self.conv1(x))
        # After the branch, as in Detectron2: the gradients that meet in x are added in this order's reverse.
        y: Tensor = self.conv3(out, x if self.shortcut is None else self.shortcut(x))
        return y


def make_stage(
    block: Callable[..., ResidualBlock],
    num_blocks: int,
    *,
    in_channels: int,
    out_channels: int,
    first_stride: int,
    **arguments: Any,
) -> nn.Sequential:
    """Residual blocks of one resolution; only the first one strides.

    Args:
        block: :class:`BasicBlock` or :class:`BottleneckBlock`, which gets ``arguments``.
    """
    blocks = [block(in_channels, out_channels, stride=first_stride, **arguments)]
    blocks += [block(out_channels, out_channels, **arguments) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """Stem and stages res2 .. res5; those after the last wanted feature are left out (C4 ends at res4).

    Args:
        depth: 18, 34, 50, 101 or 152.
        out_features: any of "stem", "res2" .. "res5".
        stem_channels: channels of the stem.
        res2_channels: output channels of res2, doubled at each later stage; 64 for depths 18 and 34.
        num_groups, width_per_group: ResNeXt cardinality and width; 1 and 64 give ResNet.
        stride_in_1x1: see :class:`BottleneckBlock`.
        res5_dilation: 2 keeps the resolution of res4 in res5 (DC5).
        norm: see :data:`gn_det.norm.NormSpec`.
        freeze_at: 0 trains everything, 1 freezes the stem, 2 the stem and res2, ...
        recompute: in training, keep only the input of the stem and of each block, and compute the rest again in the
            backward pass (gradient checkpointing). Not for norms with running statistics.
    """

    size_divisibility = 0

    def __init__(
        self,
        *,
        depth: int = 50,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
        stem_channels: int = 64,
        res2_channels: int = 256,
        num_groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        res5_dilation: int = 1,
        norm: NormSpec = "BN",
        freeze_at: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        _check_resnet(depth, out_features, res2_channels, num_groups, res5_dilation)
        self.out_features = tuple(out_features)
        self.stem = BasicStem(in_channels=in_channels, out_channels=stem_channels, norm=norm)
        specs = {"stem": FeatureSpec(stem_channels, self.stem.stride)}
        wanted = max(STAGES.index(f) for f in out_features)
        self.stage_names = STAGES[1 : wanted + 1]
        in_channels, out_channels, stride = stem_channels, res2_channels, self.stem.stride
        for k, num_blocks in enumerate(BLOCKS_PER_STAGE[depth]):
            name = STAGES[k + 1]
            dilation = res5_dilation if name == "res5" else 1
            arguments: dict[str, Any] = {}
            if depth >= 50:
                arguments = {
                    "bottleneck_channels": num_groups * width_per_group * 2**k,
                    "num_groups": num_groups,
                    "stride_in_1x1": stride_in_1x1,
                    "dilation": dilation,
                }
            first_stride = 1 if k == 0 or dilation == 2 else 2
            stage = make_stage(
                BasicBlock if depth < 50 else BottleneckBlock,
                num_blocks,
                in_channels=in_channels,
                out_channels=out_channels,
                first_stride=first_stride,
                norm=norm,
                **arguments,
            )
            if name in self.stage_names:
                # Unwanted stages are made and dropped: Detectron2 draws their weights too, and the same seed
                # must give the same weights to what is built after them.
                self.add_module(name, stage)
                stride *= first_stride
                specs[name] = FeatureSpec(out_channels, stride)
            in_channels, out_channels = out_channels, out_channels * 2
        self.feature_specs = {name: specs[name] for name in self.out_features}
        for name in ("stem", *self.stage_names)[: max(freeze_at, 0)]:
            freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalized images to {name: (N, channels, H / stride, W / stride)}, sizes rounded up."""
        features = {}
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        x = _checkpointed(self.stem, x) if recompute else self.stem(x)
        if "stem" in self.feature_specs:
            features["stem"] = x
        for name in self.stage_names:
            stage = getattr(self, name)
            x = functools.reduce(lambda y, block: _checkpointed(block, y), stage, x) if recompute else stage(x)
            if name in self.feature_specs:
                features[name] = x
        return features


def _checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, of which only ``x`` is kept for the backward pass; the same bits in outputs and gradients."""
    if not x.requires_grad and not any(p.requires_grad for p in module.parameters()):
        y: Tensor = module(x)  # frozen: nothing is kept
    else:
        y = checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
    return y


def _check_resnet(
    depth: int, out_features: Sequence[str], res2_channels: int, num_groups: int, res5_dilation: int
) -> None:
    if depth not in BLOCKS_PER_STAGE:
        raise ConfigError(f"MODEL.RESNETS.DEPTH {depth}: use one of {', '.join(map(str, BLOCKS_PER_STAGE))}")
    if not out_features or any(f not in STAGES for f in out_features):
        raise ConfigError(f"MODEL.RESNETS.OUT_FEATURES {list(out_features)}: use one or more of {', '.join(STAGES)}")
    if res5_dilation not in (1, 2):
        raise ConfigError(f"MODEL.RESNETS.RES5_DILATION {res5_dilation}: use 1 or 2")
    if depth < 50:
        for key, value, wanted in (
            ("RES2_OUT_CHANNELS", res2_channels, 64),
            ("NUM_GROUPS", num_groups, 1),
            ("RES5_DILATION", res5_dilation, 1),
        ):
            if value != wanted:
                raise ConfigError(f"MODEL.RESNETS.{key} {value}: ResNet-{depth} needs {wanted}")
