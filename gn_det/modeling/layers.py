"""Convolution with norm and ReLU, weight fills and the description of a feature map.

Detectron2 nests the norm inside the convolution (``conv1.weight``, ``conv1.norm.weight``); so does :class:`ConvNorm`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.kernels import saving
from gn_det.kernels.weight_standardization import standardize
from gn_det.norm import NormFactory, NormSpec, get_norm, is_scripting, norm_act

#: Layers that the fills initialize.
Filled: TypeAlias = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear


class FeatureSpec(NamedTuple):
    """A feature map: ``channels``, and ``stride`` in input pixels per cell."""

    channels: int
    stride: int


class ConvNorm(nn.Conv2d):
    """2D convolution, then an optional norm, an optional addition and an optional ReLU.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: see ``nn.Conv2d``.
        norm: see :data:`gn_det.norm.NormSpec`; a :class:`gn_det.norm.NormFactory` can ask for standardized weights.
        relu: apply ReLU last.
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
        groups: int = 1,
        bias: bool = False,
        norm: NormSpec = None,
        relu: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.norm = get_norm(norm, out_channels)
        self.relu = relu
        #: formula of Weight Standardization, "" for none
        self.ws = norm.ws if isinstance(norm, NormFactory) else ""

    def fold(self) -> None:
        """Standardize the weights for good, for inference: the convolution then is a plain one."""
        with torch.no_grad():
            if self.ws:
                self.weight.copy_(standardize(self.weight, self.ws))
        self.ws = ""

    def __prepare_scriptable__(self) -> ConvNorm:
        self.fold()
        return self

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H', W'); N may be 0. ``shortcut``, of that shape, is added to the norm."""
        if not is_scripting():
            weight = standardize(self.weight, self.ws) if self.ws else self.weight
            with saving(x):
                x = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            return norm_act(self.norm, x, shortcut, self.relu)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if shortcut is not None:
            x += shortcut
        return F.relu_(x) if self.relu else x


def fold_weights(model: nn.Module) -> None:
    """Standardize all weights of ``model`` for good; see :meth:`ConvNorm.fold`. Such a model is not to be trained."""
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.fold()


# fvcore has the first two, but importing its ``fvcore.nn`` compiles TorchScript and prints torch's deprecation warning.
def c2_msra_fill(layer: Filled) -> None:
    """Caffe2's MSRAFill: normal, variance 2 / fan-out; bias 0."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(layer)


def c2_xavier_fill(layer: Filled) -> None:
    """Caffe2's XavierFill: uniform, variance 1 / fan-in; bias 0."""
    nn.init.kaiming_uniform_(layer.weight, a=1)
    _zero_bias(layer)


def normal_fill(layer: Filled, std: float) -> None:
    """Normal with standard deviation ``std``; bias 0."""
    nn.init.normal_(layer.weight, std=std)
    _zero_bias(layer)


def _zero_bias(layer: Filled) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
