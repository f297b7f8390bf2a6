"""The classifier: a detection backbone (or a small ResNet), average pooling and one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gn_det.classification.settings import DEPTHS, SMALL, Settings
from gn_det.errors import ConfigError
from gn_det.modeling.layers import ConvNorm, FeatureSpec, c2_msra_fill
from gn_det.modeling.resnet import BasicBlock, BottleneckBlock, ResNet, make_stage
from gn_det.norm import BadGroups, GroupRule, NormFactory, NormSpec

_WIDTHS = (16, 32, 64)
_BLOCKS = (BasicBlock, BottleneckBlock)


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


class Classifier(nn.Module):
    """``trunk``, mean over the image, ``linear``.

    Attributes:
        trunk: :class:`gn_det.modeling.resnet.ResNet` to res5, with Detectron2's names, or :class:`SmallResNet`.
    """

    def __init__(self, trunk: ResNet | SmallResNet, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.last = trunk.out_features[-1]
        self.linear = nn.Linear(trunk.feature_specs[self.last].channels, num_classes)
        # Goyal et al. 2017: zero-mean normal, standard deviation 0.01.
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalized images to (N, num_classes) scores."""
        scores: Tensor = self.linear(self.trunk(x)[self.last].mean(dim=(2, 3)))
        return scores


def build_classifier(settings: Settings, num_classes: int, in_channels: int = 3) -> Classifier:
    """A fresh classifier on the CPU: He's initialisation, gamma 0 in the last norm of every residual block.

    Raises:
        ConfigError: the groups do not divide the channels of a layer.
    """
    norm = NormFactory(settings.norm, GroupRule(*settings.group_rule))
    trunk: ResNet | SmallResNet
    try:
        if settings.arch in SMALL:
            trunk = SmallResNet(blocks=SMALL[settings.arch], in_channels=in_channels, norm=norm)
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
        raise ConfigError(f"pretrain {key}: {error.problem}; set {key} to one of {error.works}") from None
    for last in last_norms(trunk):  # every residual block begins as its shortcut (Goyal et al. 2017)
        nn.init.zeros_(last.get_parameter("weight"))
    return Classifier(trunk, num_classes)


def last_norms(model: nn.Module) -> list[nn.Module]:
    """The norm before the addition of every residual block."""
    convs = [m.conv3 if isinstance(m, BottleneckBlock) else m.conv2 for m in model.modules() if isinstance(m, _BLOCKS)]
    return [conv.norm for conv in convs if conv.norm is not None]


def build_optimizer(settings: Settings, model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD over one group: the paper decays all weights, gamma and beta included."""
    return torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
