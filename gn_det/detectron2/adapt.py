"""What gn_det's keys change in a model that Detectron2 has built: frozen parts and class weights."""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.errors import ConfigError
from gn_det.modeling.build import class_weights, freeze_parts
from gn_det.modeling.resnet import ResNet

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode


class WeightedOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor with a weighted classification loss; a predictor becomes one by its class alone."""

    class_weights: Tensor

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: Sequence[Any]) -> dict[str, Tensor]:
        """Detectron2's losses, ``loss_cls`` as a weighted mean."""
        losses: dict[str, Tensor] = super().losses(predictions, proposals)
        if len(predictions[0]):
            classes = torch.cat([p.gt_classes for p in proposals])
            loss = F.cross_entropy(predictions[0], classes, self.class_weights)
            losses["loss_cls"] = loss * self.loss_weight.get("loss_cls", 1.0)
        return losses


def adapt(model: nn.Module, cfg: CfgNode) -> None:
    """Apply MODEL.FREEZE and MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS to ``model`` in place; ConfigError if that is impossible.

    ``cfg`` is the config that it was built from, with the names of the classes.
    """
    freeze_parts(model, cfg.MODEL.FREEZE)
    if cfg.MODEL.BACKBONE.RECOMPUTE and not any(isinstance(m, ResNet) for m in model.modules()):
        raise ConfigError(
            "MODEL.BACKBONE.RECOMPUTE True is for gn_det's ResNet, which Detectron2 takes for MODEL.RESNETS.NORM GN, "
            "LN and IN, or by MODEL.BACKBONE.NAME build_gn_resnet_fpn_backbone; set it False"
        )
    weights = class_weights(cfg)
    if weights is None:
        return
    predictors = [m for m in model.modules() if type(m) is FastRCNNOutputLayers]
    if not predictors:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: the model has no FastRCNNOutputLayers, whose loss it weighs; remove it"
        )
    for predictor in predictors:
        predictor.__class__ = WeightedOutputLayers
        predictor.register_buffer("class_weights", torch.tensor(weights), persistent=False)
