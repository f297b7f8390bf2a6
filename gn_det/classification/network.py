"""The classifier: a detection backbone (or a small or an inflated ResNet), average pooling and one linear layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.classification.inflated import InflatedResNet
from gn_det.classification.other_norms import BatchRenorm2d, weight_normalized
from gn_det.classification.recording import layer_of
from gn_det.classification.settings import CLIPS, DEPTHS, SMALL, VGG, Settings
from gn_det.errors import ConfigError
from gn_det.modeling.layers import ConvNorm, FeatureSpec, c2_msra_fill
from gn_det.modeling.resnet import BasicBlock, BottleneckBlock, ResNet, make_stage
from gn_det.norm import BadGroups, GroupRule, NormFactory, NormSpec

_WIDTHS = (16, 32, 64)
_BLOCKS = (BasicBlock, BottleneckBlock)
_NORMS = (nn.GroupNorm, nn.BatchNorm3d, nn.SyncBatchNorm)


class SmallResNet(nn.Module):
    """He et al.'s ResNet for CIFAR: 3x3 stem, three stages of ``blocks`` basic blocks with 16, 32 and 64 channels.

    (N, in_channels, H, W) to {"res4": (N, 64, ceil(H / 4), ceil(W / 4))}.
    """

    out_features = ("res4",)

    def __init__(self, *, blocks: int, in_channels: int, norm: NormSpec) -> None:
        super().__init__()
        channels = _WIDTHS[0]
        conv1 = ConvNorm(in_channels, channels, kernel_size=3, padding=1, norm=norm, relu=True)
        c2_msra_fill(conv1)
        self.stem = nn.Sequential()
        self.stem.add_module("conv1", conv1)
        for k, width in enumerate(_WIDTHS, start=2):
            stride = 1 if k == 2 else 2
            stage = make_stage(
                BasicBlock, blocks, in_channels=channels, out_channels=width, first_stride=stride, norm=norm
            )
            self.add_module(f"res{k}", stage)
            channels = width
        self.feature_specs = {"res4": FeatureSpec(channels, 4)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for name in ("res2", "res3", "res4"):
            x = getattr(self, name)(x)
        return {"res4": x}


class VGG16(nn.Module):
    """Simonyan and Zisserman's 13 convolutions, each with a bias, then norm and ReLU; two linear layers with dropout.

    (N, in_channels, side, side) to {"fc7": (N, 4096, 1, 1)}. Names are Caffe's: conv1_1 to conv5_3, fc6, fc7.
    """

    out_features = ("fc7",)
    feature_specs: ClassVar = {"fc7": FeatureSpec(4096, 32)}

    def __init__(self, *, in_channels: int, side: int, norm: NormSpec) -> None:
        super().__init__()
        self.stages: list[list[str]] = []
        for stage, (width, convs) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
            self.stages.append([f"conv{stage}_{k}" for k in range(1, convs + 1)])
            for name in self.stages[-1]:
                conv = ConvNorm(in_channels, width, kernel_size=3, padding=1, bias=True, norm=norm, relu=True)
                nn.init.kaiming_normal_(conv.weight)  # variance 2 / fan_in
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
                self.add_module(name, conv)
                in_channels = width
        self.fc6 = nn.Linear(in_channels * (side // 32) ** 2, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        for linear in (self.fc6, self.fc7):
            # The recipe's deviation is for ImageNet's images and schedule. With fewer inputs and a short training the
            # loss does not leave that of chance, so that smaller images get torchvision's.
            nn.init.normal_(linear.weight, std=0.001 if side >= 224 else 0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for stage in self.stages:
            for name in stage:
                x = getattr(self, name)(x)
            x = F.max_pool2d(x, 2)
        for linear in (self.fc6, self.fc7):
            x = F.dropout(F.relu(linear(x.flatten(1))), 0.5, self.training)
        return {"fc7": x[:, :, None, None]}


class Classifier(nn.Module):
    """``trunk``, mean over the image or clip, ``dropout`` in training, ``linear``."""

    def __init__(self, trunk: ResNet | SmallResNet | VGG16, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.dropout = dropout
        self.last = trunk.out_features[-1]
        self.linear = nn.Linear(trunk.feature_specs[self.last].channels, num_classes)
        # Goyal et al. 2017: zero-mean normal, standard deviation 0.01.
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalized images, or (N, C, T, H, W) clips, to (N, num_classes) scores."""
        features = self.trunk(x)[self.last].mean(dim=tuple(range(2, x.dim())))
        if self.dropout:
            features = F.dropout(features, self.dropout, self.training)
        scores: Tensor = self.linear(features)
        return scores


def build_classifier(settings: Settings, num_classes: int, in_channels: int = 3) -> Classifier:
    """Build a classifier on the CPU, with He's initialization; every residual block begins as its shortcut.

    Raises ConfigError for groups that do not divide channels, and an unknown layer ``settings.record``.
    """
    other: dict[str, NormSpec] = {"WN": None, "none": None, "BR": BatchRenorm2d}
    if settings.of_clips:
        other["BN"] = nn.BatchNorm3d
    norm = other.get(settings.norm, NormFactory(settings.norm, GroupRule(*settings.group_rule), ws=settings.ws or ""))
    trunk: ResNet | SmallResNet | VGG16
    try:
        if settings.arch == VGG:
            trunk = VGG16(in_channels=in_channels, side=settings.side, norm=norm)
        elif settings.arch in SMALL:
            trunk = SmallResNet(blocks=SMALL[settings.arch], in_channels=in_channels, norm=norm)
        elif settings.of_clips:
            trunk = InflatedResNet(depth=CLIPS[settings.arch], in_channels=in_channels, norm=norm)
        else:
            depth = DEPTHS[settings.arch]
            trunk = ResNet(
                depth=depth,
                out_features=["res5"],
                in_channels=in_channels,
                res2_channels=64 if depth < 50 else 256,
                stride_in_1x1=settings.stride_in_1x1,
                norm=norm,
            )
    except BadGroups as error:
        key = "channels_per_group" if settings.channels_per_group else "groups"
        raise ConfigError(f"classify {key}: {error.problem}; set {key} to one of {error.works}") from None
    if norm is None:
        for module in trunk.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.out_channels))  # in place of beta
    if settings.norm == "WN":
        weight_normalized(trunk)
    if settings.record is not None:
        layer_of(trunk, settings.record)
    for last in last_layers(trunk):  # every residual block begins as its shortcut (Goyal et al. 2017)
        gain = last.parametrizations.weight.original0 if settings.norm == "WN" else last.weight
        nn.init.zeros_(gain)
    return Classifier(trunk, num_classes, settings.dropout or 0.0)


def last_layers(model: nn.Module) -> list[Any]:
    """What comes before the addition of every residual block: its norm, or its convolution where it has none."""
    convs = [m.conv3 if isinstance(m, BottleneckBlock) else m.conv2 for m in model.modules() if isinstance(m, _BLOCKS)]
    return [conv if conv.norm is None else conv.norm for conv in convs]


def build_optimizer(settings: Settings, model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD; the paper decays all parameters, gamma and beta included; VGG's recipe weights alone, and I3D's no norm."""
    norms = {p for m in model.modules() if settings.of_clips and isinstance(m, _NORMS) for p in m.parameters()}
    free = [p for p in model.parameters() if p in norms or (settings.arch == VGG and p.dim() < 2)]
    kept = {*free}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p not in kept]}]
    return torch.optim.SGD(
        groups + ([{"params": free, "weight_decay": 0.0}] if free else []),
        lr=lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
