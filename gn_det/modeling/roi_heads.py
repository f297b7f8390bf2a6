"""RoI heads: sample proposals in training, cut their features, predict classes, boxes and masks.

Shape letters: B images, P RoIs of all images, C channels, S side of a pooled grid, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gn_det.modeling import boxes as box_ops
from gn_det.modeling.heads import BoxPredictor, MaskHead, mask_loss, mask_probabilities
from gn_det.modeling.matcher import IGNORE, Matcher, sample_labels
from gn_det.modeling.metrics import Metrics
from gn_det.modeling.poolers import RoIPooler
from gn_det.modeling.rpn import Proposals
from gn_det.structures import Detections, Masks, Targets


@dataclass(frozen=True)
class RoISampler:
    """Chooses the RoIs that train the heads.

    Attributes:
        matcher: labels proposals by IoU.
        num_classes: K, also the label of background.
        batch_size_per_image, positive_fraction: RoIs per image and quota of foreground.
        append_gt: the ground-truth boxes are proposals too.
    """

    matcher: Matcher
    num_classes: int
    batch_size_per_image: int = 512
    positive_fraction: float = 0.25
    append_gt: bool = True

    @torch.no_grad()
    def sample(self, proposals: Proposals, target: Targets) -> SampledRoIs:
        """The RoIs of one image, foreground first."""
        boxes = torch.cat([proposals.boxes, target.boxes]) if self.append_gt else proposals.boxes
        classes, matches = label_boxes(boxes, target, self.matcher, self.num_classes)
        foreground, background = sample_labels(
            classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
        )
        picked = torch.cat([foreground, background])
        matched = matches[picked]
        # Without objects there is no ground truth to index; use a dummy box that no loss reads.
        gt_boxes = target.boxes[matched] if len(target) else boxes[picked]
        masks = target.masks[matched[: len(foreground)]] if target.masks is not None and len(target) else Masks([])
        return SampledRoIs(boxes[picked], classes[picked], gt_boxes, masks, len(foreground))


def label_boxes(boxes: Tensor, target: Targets, matcher: Matcher, num_classes: int) -> tuple[Tensor, Tensor]:
    """Class (P,) of each box, ``num_classes`` for background, and the index (P,) of its ground truth."""
    matches, labels = matcher(box_ops.pairwise_iou(target.boxes, boxes))
    if not len(target):
        return torch.full_like(matches, num_classes), matches
    classes = target.classes[matches]
    classes.masked_fill_(labels == 0, num_classes)
    classes.masked_fill_(labels == -1, IGNORE)
    return classes, matches


@dataclass
class SampledRoIs:
    """Training RoIs of one image: the first ``num_foreground`` of P rows are objects, the rest background.

    ``boxes`` and ``gt_boxes`` (P, 4), ``classes`` (P,) in [0, K]; ``masks`` those of the foreground only.
    """

    boxes: Tensor
    classes: Tensor
    gt_boxes: Tensor
    masks: Masks
    num_foreground: int

    def __len__(self) -> int:
        return len(self.boxes)


class RoIHeads(nn.Module):
    """What standard and res5 heads share: sampling, losses of the box predictor, mask targets.

    Args:
        sampler: chooses training RoIs.
        in_features: names of the levels that are pooled.
    """

    mask_head: MaskHead | None

    def __init__(self, *, sampler: RoISampler, in_features: Sequence[str]) -> None:
        super().__init__()
        self.sampler = sampler
        self.in_features = tuple(in_features)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Proposals],
        targets: Sequence[Targets] | None = None,
        metrics: Metrics | None = None,
    ) -> tuple[list[Detections], dict[str, Tensor]]:
        """Losses in training (no detections), detections otherwise (no losses).

        Detections are at network resolution, ``masks`` (N, 2 S, 2 S) float probabilities within the boxes.
        """
        levels = [features[name] for name in self.in_features]
        if not self.training:
            return self.detect(levels, proposals), {}
        if targets is None:
            raise ValueError("training needs targets")
        metrics = metrics or Metrics()
        sampled = [self.sampler.sample(p, t) for p, t in zip(proposals, targets)]
        num_foreground = sum(s.num_foreground for s in sampled)
        metrics.put("roi_head/num_fg_samples", num_foreground / len(sampled))
        metrics.put("roi_head/num_bg_samples", (sum(map(len, sampled)) - num_foreground) / len(sampled))
        return [], self.train_losses(levels, sampled, targets, metrics)

    @property
    def predictors(self) -> list[BoxPredictor]:
        """Box predictors in the order in which they refine a box; the last one's settings choose detections."""
        raise NotImplementedError

    def detect(self, levels: Sequence[Tensor], proposals: Sequence[Proposals]) -> list[Detections]:
        """Masks are predicted for the final boxes only."""
        detections = self.detect_boxes(levels, proposals)
        self.add_masks(levels, detections)
        return detections

    def detect_boxes(self, levels: Sequence[Tensor], proposals: Sequence[Proposals]) -> list[Detections]:
        """Detections without masks."""
        raise NotImplementedError

    def add_masks(self, levels: Sequence[Tensor], detections: Sequence[Detections]) -> None:
        """Predict the masks of given boxes, at network resolution; does nothing without a mask head."""
        raise NotImplementedError

    def train_losses(
        self, levels: Sequence[Tensor], sampled: Sequence[SampledRoIs], targets: Sequence[Targets], metrics: Metrics
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    @staticmethod
    def _box_losses(
        predictor: BoxPredictor, logits: Tensor, deltas: Tensor, sampled: Sequence[SampledRoIs], metrics: Metrics
    ) -> dict[str, Tensor]:
        return predictor.losses(
            logits,
            deltas,
            torch.cat([s.boxes for s in sampled]),
            torch.cat([s.gt_boxes for s in sampled]),
            torch.cat([s.classes for s in sampled]),
            metrics,
        )

    def _mask_loss(self, logits: Tensor, sampled: Sequence[SampledRoIs], metrics: Metrics) -> Tensor:
        classes = torch.cat([s.classes[: s.num_foreground] for s in sampled])
        targets = torch.cat([s.masks.crop_and_resize(s.boxes[: s.num_foreground], logits.shape[-1]) for s in sampled])
        return mask_loss(logits, classes, targets, metrics)

    @staticmethod
    def _attach_masks(logits: Tensor, detections: Sequence[Detections]) -> None:
        probabilities = mask_probabilities(logits, torch.cat([d.classes for d in detections]))
        for d, p in zip(detections, torch.split(probabilities, [len(d) for d in detections])):
            d.masks = p


class StandardRoIHeads(RoIHeads):
    """Box head and mask head, each with its own pooling (FPN).

    Args:
        box_pooler, box_head, box_predictor: the box branch.
        mask_pooler, mask_head: the mask branch, None without masks.
        sampler, in_features: see :class:`RoIHeads`.
    """

    def __init__(
        self,
        *,
        sampler: RoISampler,
        in_features: Sequence[str],
        box_pooler: RoIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_pooler: RoIPooler | None = None,
        mask_head: MaskHead | None = None,
    ) -> None:
        super().__init__(sampler=sampler, in_features=in_features)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head

    @property
    def stages(self) -> list[tuple[nn.Module, BoxPredictor]]:
        """Box heads and predictors in the order in which they refine a box."""
        return [(self.box_head, cast("BoxPredictor", self.box_predictor))]

    @property
    def predictors(self) -> list[BoxPredictor]:
        return [predictor for _, predictor in self.stages]

    def detect_boxes(self, levels: Sequence[Tensor], proposals: Sequence[Proposals]) -> list[Detections]:
        boxes = [p.boxes for p in proposals]
        ((head, predictor),) = self.stages
        logits, deltas = predictor(head(self.box_pooler(levels, boxes)))
        return predictor.detect(logits, deltas, boxes, [p.image_size for p in proposals])

    def add_masks(self, levels: Sequence[Tensor], detections: Sequence[Detections]) -> None:
        if self.mask_head is not None and self.mask_pooler is not None:
            pooled = self.mask_pooler(levels, [d.boxes for d in detections])
            self._attach_masks(self.mask_head(pooled), detections)

    def train_losses(
        self, levels: Sequence[Tensor], sampled: Sequence[SampledRoIs], targets: Sequence[Targets], metrics: Metrics
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box_reg, and loss_mask over the foreground RoIs."""
        losses = self.train_boxes(levels, sampled, targets, metrics)
        if self.mask_head is not None and self.mask_pooler is not None:
            pooled = self.mask_pooler(levels, [s.boxes[: s.num_foreground] for s in sampled])
            losses["loss_mask"] = self._mask_loss(self.mask_head(pooled), sampled, metrics)
        return losses

    def train_boxes(
        self, levels: Sequence[Tensor], sampled: Sequence[SampledRoIs], targets: Sequence[Targets], metrics: Metrics
    ) -> dict[str, Tensor]:
        """Losses of the box branch."""
        ((head, predictor),) = self.stages
        logits, deltas = predictor(head(self.box_pooler(levels, [s.boxes for s in sampled])))
        return self._box_losses(predictor, logits, deltas, sampled, metrics)


class Res5RoIHeads(RoIHeads):
    """C4: res5 runs on the pooled features and serves both branches; boxes from its mean, masks from its map.

    Args:
        pooler, res5: make the shared features.
        box_predictor: on their mean.
        mask_head: on the features of the foreground RoIs, None without masks.
        sampler, in_features: see :class:`RoIHeads`; exactly one level.
    """

    def __init__(
        self,
        *,
        sampler: RoISampler,
        in_features: Sequence[str],
        pooler: RoIPooler,
        res5: nn.Sequential,
        box_predictor: BoxPredictor,
        mask_head: MaskHead | None = None,
    ) -> None:
        super().__init__(sampler=sampler, in_features=in_features)
        self.pooler = pooler
        self.res5 = res5
        self.box_predictor = box_predictor
        self.mask_head = mask_head

    @property
    def predictors(self) -> list[BoxPredictor]:
        return [self.box_predictor]

    def detect_boxes(self, levels: Sequence[Tensor], proposals: Sequence[Proposals]) -> list[Detections]:
        boxes = [p.boxes for p in proposals]
        shared = self.res5(self.pooler(levels, boxes))
        logits, deltas = self.box_predictor(shared.mean(dim=(2, 3)))
        return self.box_predictor.detect(logits, deltas, boxes, [p.image_size for p in proposals])

    def add_masks(self, levels: Sequence[Tensor], detections: Sequence[Detections]) -> None:
        """On features cut again at the final boxes."""
        if self.mask_head is not None:
            shared = self.res5(self.pooler(levels, [d.boxes for d in detections]))
            self._attach_masks(self.mask_head(shared), detections)

    def train_losses(
        self, levels: Sequence[Tensor], sampled: Sequence[SampledRoIs], targets: Sequence[Targets], metrics: Metrics
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box_reg, and loss_mask over the foreground rows of the shared features."""
        shared = self.res5(self.pooler(levels, [s.boxes for s in sampled]))
        logits, deltas = self.box_predictor(shared.mean(dim=(2, 3)))
        losses = self._box_losses(self.box_predictor, logits, deltas, sampled, metrics)
        if self.mask_head is not None:
            # Foreground comes first in each image, so slices do.
            parts = [x[: s.num_foreground] for x, s in zip(torch.split(shared, [len(s) for s in sampled]), sampled)]
            losses["loss_mask"] = self._mask_loss(self.mask_head(torch.cat(parts)), sampled, metrics)
        return losses
