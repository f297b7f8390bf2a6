"""Cascade R-CNN (Cai and Vasconcelos 2018): a sequence of box heads, each trained on the boxes of the previous one.

Shape letters: P RoIs of all images, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.modeling import boxes as box_ops
from gn_det.modeling.heads import BoxHead, BoxPredictor
from gn_det.modeling.matcher import Matcher
from gn_det.modeling.metrics import Metrics
from gn_det.modeling.roi_heads import RoISampler, SampledRoIs, StandardRoIHeads, label_boxes
from gn_det.modeling.rpn import Proposals
from gn_det.structures import Detections, Masks, Targets


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class CascadeRoIHeads(StandardRoIHeads):
    """A sequence of box heads and one mask head.

    The losses of all stages are added; the gradients that reach the features are divided by the number of stages.

    Args:
        sampler: chooses the RoIs of the first stage; the other stages train on all boxes of the one before.
        matchers: label the boxes of each stage; the first one is not used, it is the sampler's.
        box_heads, box_predictors: of each stage; the predictors are class-agnostic.
        others: see :class:`StandardRoIHeads`.
    """

    def __init__(
        self,
        *,
        sampler: RoISampler,
        matchers: Sequence[Matcher],
        box_heads: Sequence[BoxHead],
        box_predictors: Sequence[BoxPredictor],
        **others: Any,
    ) -> None:
        super().__init__(
            sampler=sampler, box_head=nn.ModuleList(box_heads), box_predictor=nn.ModuleList(box_predictors), **others
        )
        self.matchers = list(matchers)

    @property
    def stages(self) -> list[tuple[nn.Module, BoxPredictor]]:
        heads, predictors = cast("nn.ModuleList", self.box_head), cast("nn.ModuleList", self.box_predictor)
        return [(head, cast("BoxPredictor", predictor)) for head, predictor in zip(heads, predictors)]

    def detect_boxes(self, levels: Sequence[Tensor], proposals: Sequence[Proposals]) -> list[Detections]:
        """Boxes of the last stage with the mean of the stages' scores."""
        sizes = [p.image_size for p in proposals]
        boxes, total = [p.boxes for p in proposals], torch.zeros((), device=levels[0].device)
        for stage, (head, predictor) in enumerate(self.stages):
            if stage:
                boxes = [box_ops.clip(b, size) for b, size in zip(boxes, sizes)]
            # Rows that are not finite pool anything, stay nan, and are dropped at the end.
            logits, deltas = predictor(head(self.box_pooler(levels, [b.nan_to_num(0.0) for b in boxes])))
            total = total + F.softmax(logits.float(), dim=-1)
            boxes = _decode(predictor, deltas, boxes)
        scores = torch.split(total * (1.0 / len(self.stages)), [len(b) for b in boxes])
        return [predictor.select(b, s, size) for b, s, size in zip(boxes, scores, sizes)]

    def train_boxes(
        self, levels: Sequence[Tensor], sampled: Sequence[SampledRoIs], targets: Sequence[Targets], metrics: Metrics
    ) -> dict[str, Tensor]:
        """loss_cls_stage0, loss_box_reg_stage0, loss_cls_stage1 ..."""
        losses: dict[str, Tensor] = {}
        outputs: list[tuple[Tensor, Tensor]] = []
        rois = list(sampled)
        for stage, (head, predictor) in enumerate(self.stages):
            scoped = Metrics(metrics, f"stage{stage}/")
            if stage:
                rois = self._relabel(rois, outputs[-1][1], targets, stage, scoped)
            pooled = self.box_pooler(levels, [r.boxes for r in rois])
            outputs.append(predictor(head(_ScaleGradient.apply(pooled, 1.0 / len(self.stages)))))
            of_stage = self._box_losses(predictor, *outputs[-1], rois, scoped)
            losses.update({f"{name}_stage{stage}": loss for name, loss in of_stage.items()})
        return losses

    @torch.no_grad()
    def _relabel(
        self, rois: Sequence[SampledRoIs], deltas: Tensor, targets: Sequence[Targets], stage: int, metrics: Metrics
    ) -> list[SampledRoIs]:
        """RoIs of ``stage``: the boxes that the stage before made of its own, empty ones left out."""
        made = []
        for boxes, target in zip(_decode(self.stages[stage - 1][1], deltas, [r.boxes for r in rois]), targets):
            boxes = box_ops.clip(boxes, target.image_size)
            boxes = boxes[box_ops.nonempty(boxes)]
            classes, matches = label_boxes(boxes, target, self.matchers[stage], self.sampler.num_classes)
            gt_boxes = target.boxes[matches] if len(target) else boxes
            made.append(SampledRoIs(boxes, classes, gt_boxes, Masks([]), 0))  # only the box losses read these
        foreground = torch.stack([(r.classes < self.sampler.num_classes).sum() for r in made]).float().mean()
        metrics.put("roi_head/num_fg_samples", foreground)
        metrics.put("roi_head/num_bg_samples", sum(map(len, made)) / len(made) - foreground)
        return made


def _decode(predictor: BoxPredictor, deltas: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
    """Boxes (Pi, 4) of each image moved by class-agnostic deltas (P, 4)."""
    return list(torch.split(predictor.coder.decode(deltas, torch.cat(list(boxes))), [len(b) for b in boxes]))
