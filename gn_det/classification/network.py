"""The classifier: a detection backbone (or a small ResNet), average pooling and one linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_det.classification.settings import DEPTHS, SMALL, Settings
from gn_det.errors import ConfigError
from gn_det.modeling.layers import ConvNorm, FeatureSpec, c2_msra_fill
from gn_det.modeling.resnet import BasicBlock, ResidualBlock, ResNet, make_stage
from gn_det.norm import GroupRule, NormFactory, NormSpec

_WIDTHS = (16, 32, 64)


class SmallResNet(nn.Module):
    """He et al.'s ResNet for CIFAR: 3x3 stem, three stages of ``blocks`` basic blocks with 16, 32 and 64 channels.

    (N, in_channels, H, W) to {"res4": (N, 64, ceil(H / 4), ceil(W / 4))}.
    """

    def __init__(self, *, blocks: int, in_channels: int, norm: NormSpec) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        conv1 = ConvNorm(in_channels, _WIDTHS[0], kernel_size=3, padding=1, norm=norm, relu=True)
        c2_msra_fill(conv1)
        self.stem.add_module("conv1", conv1)
        before = _WIDTHS[0]
        for k, width in enumerate(_WIDTHS, start=2):
            first_stride = 1 if k == 2 else 2
            stage = make_stage(
                BasicBlock, blocks, in_channels=before, out_channels=width, first_stride=first_stride, norm=norm
            )
            self.add_module(f"res{k}", stage)
            before = width
        self.out_features = ("res4",)
        self.feature_specs = {"res4": FeatureSpec(before, 4)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for name in ("res2", "res3", "res4"):
            x = getattr(self, name)(x)
        return {"res4": x}


class Classifier(nn.Module):
    """``trunk``, mean over the image, ``linear``.

    Attributes:
        trunk: :class:`gn_det.modeling.resnet.ResNet` to res5, with Detectron2's names, or :class:`SmallResNet`.
    """

    def __init__(self, trunk: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.last: str = trunk.out_features[-1]
        self.linear = nn.Linear(trunk.feature_specs[self.last].channels, num_classes)
        # Goyal et al. 2017: zero-mean normal, standard deviation 0.01.
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalized images to (N, num_classes) scores."""
        return self.linear(self.trunk(x)[self.last].mean(dim=(2, 3)))


def build_classifier(settings: Settings, num_classes: int, in_channels: int = 3) -> Classifier:
    """A fresh classifier on the CPU: He's initialisation, gamma 0 in the last norm of every residual block.

    Raises:
        ConfigError: the groups do not divide the channels of a layer, which is named.
    """
    number, per_group = settings.group_rule
    norm = NormFactory(settings.norm, GroupRule(number, per_group), "norm")
    common: dict[str, Any] = {"in_channels": in_channels, "norm": norm}
    try:
        if settings.arch in SMALL:
            trunk: nn.Module = SmallResNet(blocks=SMALL[settings.arch], **common)
        else:
            depth = DEPTHS[settings.arch]
            trunk = ResNet(
                depth=depth,
                out_features=["res5"],
                res2_channels=64 if depth < 50 else 256,
                stride_in_1x1=settings.stride_in_1x1,
                **common,
            )
    except ConfigError as error:
        text = str(error).replace("MODEL.GN.NUM_GROUPS", "groups").replace("MODEL.GN.CHANNELS_PER_GROUP", _PER_GROUP)
        raise ConfigError(f"pretrain {_PER_GROUP if per_group else 'groups'}: {text}") from None
    zero_last_gammas(trunk)
    return Classifier(trunk, num_classes)


_PER_GROUP = "channels_per_group"


def last_norms(model: nn.Module) -> list[nn.Module]:
    """The norm before the addition of every residual block."""
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    return [(block.conv3 if hasattr(block, "conv3") else block.conv2).norm for block in blocks]


def zero_last_gammas(model: nn.Module) -> None:
    """Every residual block begins as its shortcut (Goyal et al. 2017)."""
    for norm in last_norms(model):
        nn.init.zeros_(norm.weight)


def build_optimizer(settings: Settings, model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD over one group: the paper decays all weights, gamma and beta included."""
    return torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
