"""Convolution with norm and ReLU, weight fills and the description of a feature map.

Detectron2 nests the norm inside the convolution (``conv1.weight``, ``conv1.norm.weight``); so does :class:`ConvNorm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.kernels import saving
from gn_det.norm import GroupRule, NormSpec, get_norm, norm_act


class FeatureSpec(NamedTuple):
    """A feature map: ``channels``, and ``stride`` in input pixels per cell."""

    channels: int
    stride: int


class ConvNorm(nn.Conv2d):
    """2D convolution, then an optional norm, an optional addition and an optional ReLU.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, conv_groups, bias: the convolution.
        norm: see :func:`gn_det.norm.get_norm`.
        groups: rule for the groups of GN (``conv_groups`` are those of the convolution).
        relu: apply ReLU last.
        layer: full name, for messages.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        conv_groups: int = 1,
        bias: bool = False,
        norm: NormSpec = None,
        groups: GroupRule | None = None,
        relu: bool = False,
        layer: str = "",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=conv_groups,
            bias=bias,
        )
        self.norm = get_norm(norm, out_channels, layer=layer, groups=groups)
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H', W'); N may be 0. ``shortcut``, of that shape, is added to the norm."""
        if not torch.jit.is_scripting():
            with saving(x):
                x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            return norm_act(self.norm, x, shortcut, self.relu)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if shortcut is not None:
            x += shortcut
        return F.relu_(x) if self.relu else x


def _zero_bias(layer: nn.Module) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def fill_msra(layer: nn.Module) -> None:
    """Caffe2's MSRAFill: normal, variance 2 / fan-out; bias 0."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(layer)


def fill_xavier(layer: nn.Module) -> None:
    """Caffe2's XavierFill: uniform, variance 1 / fan-in; bias 0."""
    nn.init.kaiming_uniform_(layer.weight, a=1)
    _zero_bias(layer)


def fill_normal(layer: nn.Module, std: float) -> None:
    """Normal with standard deviation ``std``; bias 0."""
    nn.init.normal_(layer.weight, std=std)
    _zero_bias(layer)
