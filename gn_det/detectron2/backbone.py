"""gn_det's ResNet and FPN as Detectron2 backbones."""

# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from gn_det.config.kinds import THEIR_NORMS
from gn_det.detectron2.scripting import ScriptableFPN, ScriptableResNet
from gn_det.errors import ConfigError
from gn_det.modeling.build import fpn_arguments, group_rule, is_pre_activation, resnet_arguments, weight_standardization
from gn_det.modeling.fpn import FPN
from gn_det.modeling.layers import FeatureSpec
from gn_det.modeling.resnet import ResNet
from gn_det.modeling.resnet_v2 import ResNetV2
from gn_det.norm import GroupRule, NormSpec, norm_with_groups

if TYPE_CHECKING:
    from detectron2.config import CfgNode


class GNResNet(ResNet, Backbone):
    """:class:`gn_det.modeling.resnet.ResNet` with Detectron2's backbone interface; same keyword arguments.

    Parameter names, strides and initial weights (from the same seed) are those of Detectron2's ResNet.
    """

    def __init__(self, *, norm: NormSpec = "BN", groups: GroupRule | None = None, **others: Any) -> None:
        super().__init__(norm=norm_with_groups(norm, groups), **others)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride by feature name, fine to coarse."""
        return {name: ShapeSpec(channels=s.channels, stride=s.stride) for name, s in self.feature_specs.items()}

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptableResNet(self)


class GNResNetV2(ResNetV2, Backbone):
    """:class:`gn_det.modeling.resnet_v2.ResNetV2` under Detectron2's backbone contract; the same keyword arguments."""

    output_shape = GNResNet.output_shape
    __prepare_scriptable__ = GNResNet.__prepare_scriptable__


class GNFPN(FPN, Backbone):
    """:class:`gn_det.modeling.fpn.FPN` with Detectron2's backbone interface.

    Args:
        bottom_up: any Detectron2 ``Backbone``, such as :class:`GNResNet`.
        in_features, out_channels, norm, fuse_type: as for :class:`gn_det.modeling.fpn.FPN`.
        top_block: makes the levels above the last, like Detectron2's ``LastLevelMaxPool`` and ``LastLevelP6P7``.
        square_pad: if positive, images are padded to squares of this side.
        groups: deprecated, see :func:`gn_det.norm.norm_with_groups`.
    """

    #: Set per instance; replaces Backbone's property.
    size_divisibility: int = 0
    output_shape = GNResNet.output_shape

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int,
        norm: NormSpec = "GN",
        top_block: Any = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
        groups: GroupRule | None = None,
    ) -> None:
        super().__init__(
            bottom_up,
            in_features=in_features,
            out_channels=out_channels,
            norm=norm_with_groups(norm, groups),
            fuse_type=fuse_type,
            specs=bottom_up.output_shape(),
        )
        self.square_pad = square_pad
        self.top_block: Any = top_block
        # As in Detectron2, registered after the top block, which determines the order of optimizer states.
        del self.bottom_up
        self.bottom_up = bottom_up
        end = self.levels[-1] + 1 + (top_block.num_levels if top_block is not None else 0)
        self.feature_specs = {f"p{k}": FeatureSpec(out_channels, 2**k) for k in range(self.levels[0], end)}

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Return the side of the square that images are padded to; 0 for none."""
        return {"square_size": self.square_pad}

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptableFPN(self, self.bottom_up, self.top_block, self.square_pad)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W), H and W multiples of ``size_divisibility``, to {"p2": ..., ...}, fine to coarse."""
        features = self.bottom_up(x)
        outputs = self.pyramid(features)
        if self.top_block is not None:
            source = self.top_block.in_feature
            below = features[source] if source in features else outputs[self.levels.index(int(source[1:]))]
            outputs.extend(self.top_block(below))
        return dict(zip(self.feature_specs, outputs))


@BACKBONE_REGISTRY.register()
def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet with the norms of MODEL.GN, or Detectron2's if only that has the convolutions or norm."""
    resnets = cfg.MODEL.RESNETS
    if not any(resnets.DEFORM_ON_PER_STAGE) and resnets.NORM not in THEIR_NORMS:
        bottom_up = GNResNetV2 if is_pre_activation(cfg) else GNResNet
        return bottom_up(in_channels=input_shape.channels, **resnet_arguments(cfg))
    other_norm = resnets.NORM in ("LN", "IN") or (resnets.NORM == "GN" and group_rule(cfg) != GroupRule())
    for key, given, default in (
        (f"MODEL.RESNETS.NORM {resnets.NORM} with this MODEL.GN", other_norm, "GN with the default MODEL.GN"),
        (f"MODEL.RESNETS.VARIANT {resnets.get('VARIANT')}", is_pre_activation(cfg), "v1"),
        ("MODEL.WS.RESNETS", weight_standardization(cfg, "RESNETS"), "''"),
    ):
        if given:
            raise ConfigError(
                f"{key} is not in Detectron2's ResNet, which alone has deformable convolutions "
                f"(MODEL.RESNETS.DEFORM_ON_PER_STAGE) and the norms {', '.join(THEIR_NORMS)}; use {default}"
            )
    return build_resnet_backbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> GNFPN:
    """Build an FPN on that ResNet, with one more level by subsampling the coarsest (p6 from p5)."""
    top = LastLevelMaxPool()
    fpn = GNFPN(build_gn_resnet_backbone(cfg, input_shape), top_block=top, **fpn_arguments(cfg))
    top.in_feature = f"p{fpn.levels[-1]}"  # Detectron2 says p5, whatever the coarsest level is
    return fpn


@BACKBONE_REGISTRY.register()
def build_gn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> GNFPN:
    """Build an FPN on that ResNet, with p6 and p7 by convolutions on res5."""
    bottom_up = build_gn_resnet_backbone(cfg, input_shape)
    top = LastLevelP6P7(bottom_up.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return GNFPN(bottom_up, top_block=top, **fpn_arguments(cfg))
