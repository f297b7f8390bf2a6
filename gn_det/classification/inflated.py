"""I3D: a 2-D ResNet whose convolutions get a dimension of time (Carreira and Zisserman 2017, Wang et al. 2018).

Shape letters: N clips, C channels, T frames, H, W rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.checkpoint.formats.common import Weights
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.preprocessing import Preprocessing
from gn_det.classification.image_sources import Input
from gn_det.errors import WeightsError
from gn_det.modeling.layers import ConvNorm, c2_msra_fill
from gn_det.modeling.resnet import ResNet
from gn_det.norm import NormSpec, norm_act

#: Stages in which every second block has a temporal kernel of 3, from the first or from the second block on; all
#: blocks of res2 have one.
_FIRST_OF_TWO, _SECOND_OF_TWO = ("res3", "res4"), ("res5",)
_PREFIXES = ("backbone.bottom_up.", "backbone.")
#: Norm of the weights -> norms of the clip network that compute the same on each frame's statistics.
_SUITS = {"BN": ("BN", "SyncBN"), "affine BN": ("BN", "SyncBN"), "": ("none",)}


class ConvNorm3d(nn.Conv3d):
    """3-D convolution, then an optional norm, an optional addition and an optional ReLU.

    Args:
        conv: the 2-D convolution that it takes the place of: channels, spatial kernel and stride, bias, norm, ReLU.
        kernel: frames of the temporal kernel, odd; padded so that with ``stride`` 1 the number of frames stays.
        stride: temporal stride.
    """

    def __init__(self, conv: ConvNorm, kernel: int, stride: int = 1) -> None:
        assert not isinstance(conv.padding, str)
        (kernel_y, kernel_x), (stride_y, stride_x), (pad_y, pad_x) = conv.kernel_size, conv.stride, conv.padding
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            (kernel, kernel_y, kernel_x),
            stride=(stride, stride_y, stride_x),
            padding=(kernel // 2, pad_y, pad_x),
            bias=conv.bias is not None,
        )
        self.norm, self.relu = conv.norm, conv.relu
        c2_msra_fill(self)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(N, C, T, H, W) to (N, out_channels, T', H', W'). ``shortcut``, of that shape, is added to the norm."""
        return norm_act(self.norm, self._conv(x), shortcut, self.relu)

    def _conv(self, x: Tensor) -> Tensor:
        """The convolution; on a CPU in two dimensions where its kernel has no third, which takes less time."""
        assert not isinstance(self.padding, str)
        (frames, *pixels), (step, *steps), (before, *around) = self.kernel_size, self.stride, self.padding
        here = x.is_cpu and x.is_contiguous()
        if here and frames == step == 1 and pixels != [1, 1]:  # each frame on its own
            images = x.transpose(1, 2).flatten(0, 1)
            images = F.conv2d(images, self.weight[:, :, 0], self.bias, tuple(steps), tuple(around))
            return images.view(len(x), x.shape[2], *images.shape[1:]).transpose(1, 2).contiguous()
        if here and frames > 1 and pixels == steps == [1, 1]:  # images of T rows and H * W columns
            images = F.conv2d(x.flatten(3), self.weight[..., 0], self.bias, (step, 1), (before, 0))
            return images.view(*images.shape[:3], *x.shape[3:])
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding)


class InflatedResNet(ResNet):
    """ResNet-18, 34, 50 or deeper for clips, with the parameter names of the 2-D one.

    The first convolution of an inflated block (1x1 of a bottleneck, 3x3 of a basic block) has a temporal kernel of 3,
    all others of 1. The stem is 5x7x7 of stride 2, 2, 2 with 2x3x3 pooling of stride 2, and res2 is followed by 2x1x1
    pooling of stride 2, so that 32 frames become 8 after the stem and 4 in res5.

    Args:
        depth, in_channels: see :class:`gn_det.modeling.resnet.ResNet`.
        norm: of 5-D maps; see :data:`gn_det.norm.NormSpec`.
    """

    def __init__(self, *, depth: int, in_channels: int = 3, norm: NormSpec) -> None:
        super().__init__(
            depth=depth,
            out_features=["res5"],
            in_channels=in_channels,
            res2_channels=64 if depth < 50 else 256,
            norm=norm,
        )
        self.stem.conv1 = ConvNorm3d(self.stem.conv1, 5, 2)  # type: ignore[assignment]
        for stage in self.stage_names:
            for number, block in enumerate(getattr(self, stage)):
                skipped = (stage in _FIRST_OF_TWO and number % 2) or (stage in _SECOND_OF_TWO and not number % 2)
                for name, conv in list(block.named_children()):
                    if conv is not None:
                        block.add_module(name, ConvNorm3d(conv, 3 if name == "conv1" and not skipped else 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, T, H, W) normalized clips to {"res5": (N, channels, T / 8, H / 32, W / 32)}."""
        x = F.max_pool3d(self.stem.conv1(x), (2, 3, 3), stride=2)
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name == "res2":
                x = F.max_pool3d(x, (2, 1, 1))
        return {"res5": x}


def inflate_(network: InflatedResNet, source: str, norm: str, groups: tuple[int, int]) -> Input:
    """Put the weights of a 2-D backbone into ``network``: kernels repeated over time and divided by their frames.

    Args:
        source: path or URI of any ResNet that MODEL.WEIGHTS takes, a backbone or a detector.
        norm, groups: norm of the network by name; its groups and channels per group.

    Returns:
        The input that the weights expect.

    Raises:
        WeightsError: not a plain ResNet of this depth and norm, or its preprocessing is unknown.
    """
    weights = open_weights(source)
    state = _backbone(weights, network)
    _check_norm(source, weights, state, norm, groups)
    needs = weights.preprocessing or Preprocessing()
    if needs.stride_in_1x1:
        raise WeightsError(
            f"{source}: its bottlenecks stride in the 1x1 convolution, I3D's in the 3x3: take weights with "
            "MODEL.RESNETS.STRIDE_IN_1X1 False, such as torchvision's or R-50-GN"
        )
    if needs.format not in ("RGB", "BGR") or not needs.pixel_mean or not needs.pixel_std:
        raise WeightsError(f"{source}: does not say which channel order, mean and std it was trained with")
    ours = network.state_dict()
    placed = {}
    for name, value in ours.items():
        theirs = state.get(name)
        if theirs is None and name.endswith(("running_mean", "running_var")):  # folded into scale and shift
            theirs = torch.full_like(value, float(name.endswith("var")))
        if theirs is None and name.endswith("num_batches_tracked"):
            theirs = value
        if theirs is not None and value.dim() == 5 and theirs.dim() == 4:
            theirs = (theirs.to(value.dtype) / value.shape[2]).unsqueeze(2).expand(-1, -1, value.shape[2], -1, -1)
        if theirs is None or theirs.shape != value.shape:
            found = "lacks" if theirs is None else f"has shape {tuple(theirs.shape)} of"
            raise WeightsError(
                f"{source} ({weights.kind}): {found} {name}, {tuple(value.shape)} in the network: I3D is inflated from "
                "a plain ResNet of the same depth"
            )
        if not torch.isfinite(theirs).all():
            raise WeightsError(f"{source}: {name} holds NaN or infinity; take another file")
        placed[name] = theirs
    network.load_state_dict(placed)
    return Input(needs.format, needs.pixel_mean, needs.pixel_std)


def _backbone(weights: Weights, network: nn.Module) -> dict[str, Tensor]:
    """Tensors by bare names; those of a detector without its prefix."""
    for prefix in _PREFIXES:
        if f"{prefix}stem.conv1.weight" in weights.state:
            return {k.removeprefix(prefix): v for k, v in weights.state.items() if k.startswith(prefix)}
    return dict(weights.state)


def _check_norm(source: str, weights: Weights, state: dict[str, Any], norm: str, groups: tuple[int, int]) -> None:
    found = weights.norm
    if not found:
        statistics = "stem.conv1.norm.running_mean" in state
        found = "BN" if statistics else "affine" if "stem.conv1.norm.weight" in state else ""
    suits = ("GN", "LN", "IN") if found == "affine" else _SUITS.get(found, (found,))
    if norm not in suits:
        raise WeightsError(
            f"{source}: is a backbone with {found or 'no norm'}, the network has {norm}: use --norm {suits[0]}, or "
            "other weights (scale and shift do not carry over)"
        )
    if norm == "GN" and weights.groups and weights.groups != groups and weights.groups[0]:
        raise WeightsError(
            f"{source}: was trained with {weights.groups[0]} groups and {weights.groups[1]} channels per group (0: by "
            f"groups), the network has {groups[0]} and {groups[1]}: set --groups or --channels-per-group"
        )
