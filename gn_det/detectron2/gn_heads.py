"""gn_det's box head, mask head and res5 stage in Detectron2's RoI heads."""

# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.config import LazyCall, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    BaseMaskRCNNHead,
    Res5ROIHeads,
)
from torch import nn

from gn_det.detectron2.scripting import ScriptableMaskHead, scriptable_box_head
from gn_det.errors import ConfigError
from gn_det.modeling.build import build_res5, norm_factory
from gn_det.modeling.heads import BoxHead, MaskHead
from gn_det.norm import GroupRule, NormFactory, NormSpec, norm_with_groups

if TYPE_CHECKING:
    from detectron2.config import CfgNode


@ROI_BOX_HEAD_REGISTRY.register()
class GNFastRCNNConvFCHead(BoxHead):
    """3x3 convolutions with norm and ReLU, then fully connected layers with ReLU ("4conv1fc").

    Args:
        input_shape: channels and square size of the pooled features.
        conv_dims: output channels of the convolutions.
        fc_dims: output sizes of the fully connected layers.
        conv_norm: see :data:`gn_det.norm.NormSpec`; without a norm the convolutions have biases.
        groups: deprecated, see :func:`gn_det.norm.norm_with_groups`.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        conv_norm: NormSpec = "GN",
        groups: GroupRule | None = None,
    ) -> None:
        if input_shape.height != input_shape.width:
            raise ConfigError(f"box head: takes square RoI features, got {input_shape.height}x{input_shape.width}")
        super().__init__(
            input_shape.channels,
            input_shape.height,
            conv_dims=conv_dims,
            fc_dims=fc_dims,
            norm=norm_with_groups(conv_norm, groups),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "conv_dims": [head.CONV_DIM] * head.NUM_CONV,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": norm_factory(cfg, "ROI_BOX_HEAD"),
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """Return the length of the RoI vectors as channels."""
        return ShapeSpec(channels=self.output_size)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable_box_head(self)


@ROI_MASK_HEAD_REGISTRY.register()
class GNMaskRCNNConvUpsampleHead(MaskHead, BaseMaskRCNNHead):
    """3x3 convolutions with norm and ReLU, a 2x2 deconvolution, one mask per class; Detectron2's loss and inference.

    Args:
        input_shape: channels of the pooled features.
        num_classes: masks per RoI; 1 for class-agnostic ones.
        conv_dims: output channels of the convolutions, and last of the deconvolution.
        conv_norm: see :data:`gn_det.norm.NormSpec`; without a norm the convolutions have biases.
        groups: deprecated, see :func:`gn_det.norm.norm_with_groups`.
        loss_weight, vis_period: see Detectron2's BaseMaskRCNNHead.
    """

    forward = BaseMaskRCNNHead.forward
    layers = MaskHead.forward

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: NormSpec = "GN",
        groups: GroupRule | None = None,
        loss_weight: float = 1.0,
        vis_period: int = 0,
    ) -> None:
        super().__init__(
            input_shape.channels, num_classes, conv_dims=conv_dims, norm=norm_with_groups(conv_norm, groups)
        )
        self.loss_weight = loss_weight
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_HEAD
        return {
            "input_shape": input_shape,
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dims": [head.CONV_DIM] * (head.NUM_CONV + 1),
            "conv_norm": norm_factory(cfg, "ROI_MASK_HEAD"),
            "vis_period": cfg.VIS_PERIOD,
        }

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptableMaskHead(self)


@ROI_HEADS_REGISTRY.register()
class GNRes5ROIHeads(Res5ROIHeads):
    """Detectron2's C4 heads on gn_det's res5, with the norms of MODEL.GN.

    Without a config it takes the same keyword arguments, with, for example,
    :func:`gn_det.modeling.resnet.make_stage` for ``res5``.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        return build_res5(cfg)


def use_gn_heads(model: Any, rule: GroupRule | None = None) -> None:
    """Replace the box and mask heads of a LazyConfig by gn_det's with GN, in place; sizes and weight names stay.

    For Detectron2's ``model`` configs with StandardROIHeads, such as ViTDet's and those of new_baselines, and with
    CascadeROIHeads, which have a box head for each stage.

    Args:
        model: LazyConfig of a GeneralizedRCNN.
        rule: groups; None for 32.

    Raises:
        ConfigError: there is no box head, or one without convolutions and so without norms.
    """
    heads = model.get("roi_heads") or {}
    boxes = heads.get("box_heads") or ([heads["box_head"]] if "box_head" in heads else [])
    if not boxes or not all(box.conv_dims for box in boxes):
        raise ConfigError(
            "roi_heads: GN is for StandardROIHeads or CascadeROIHeads with convolutions in box_head or box_heads; set "
            "its conv_dims to [256] * 4 and fc_dims to [1024]"
        )
    norm = LazyCall(NormFactory)(kind="GN", rule=LazyCall(GroupRule)(**dataclasses.asdict(rule or GroupRule())))
    for head in boxes:
        head._target_, head.conv_norm = GNFastRCNNConvFCHead, norm
    if mask := heads.get("mask_head"):
        mask._target_, mask.conv_norm = GNMaskRCNNConvUpsampleHead, norm
