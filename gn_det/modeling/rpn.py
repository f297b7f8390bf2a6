"""Region Proposal Network (Ren et al. 2015), on one level (C4) or a pyramid (FPN).

Shape letters: B images; A anchors per cell; Ri cells of level i times A; R all Ri together; G ground truths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from gn_det.modeling import boxes as box_ops
from gn_det.modeling.anchors import AnchorGenerator
from gn_det.modeling.boxes import BoxCoder
from gn_det.modeling.layers import ConvNorm, normal_fill
from gn_det.modeling.matcher import IGNORE, Matcher, sample_labels
from gn_det.modeling.metrics import Metrics
from gn_det.structures import Targets


@dataclass
class Proposals:
    """Proposals of one image: ``boxes`` (P, 4) float32 within the (H, W) image, best ``logits`` (P,) first."""

    image_size: tuple[int, int]
    boxes: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.boxes)


class RPNHead(nn.Module):
    """3x3 convolution(s) with ReLU, then 1x1 convolutions for objectness and for deltas, shared by all levels.

    Args:
        in_channels: C of every level.
        num_anchors: A.
        conv_dims: output channels of the 3x3 convolutions; -1 keeps the number of channels.
    """

    def __init__(self, in_channels: int, num_anchors: int, *, conv_dims: Sequence[int] = (-1,)) -> None:
        super().__init__()
        convs = []
        channels = in_channels
        for dim in conv_dims:
            out = channels if dim == -1 else dim
            convs.append(ConvNorm(channels, out, kernel_size=3, padding=1, bias=True, relu=True))
            channels = out
        self.conv: nn.Module = convs[0]
        if len(convs) > 1:
            self.conv = nn.Sequential()
            for k, conv in enumerate(convs):
                self.conv.add_module(f"conv{k}", conv)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                normal_fill(layer, 0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level logits (B, A, H, W) and deltas (B, A * 4, H, W)."""
        logits, deltas = [], []
        for x in features:
            x = self.conv(x)
            logits.append(self.objectness_logits(x))
            deltas.append(self.anchor_deltas(x))
        return logits, deltas


class RPN(nn.Module):
    """Proposals from feature maps, and in training the two RPN losses.

    Args:
        head: predicts logits and deltas.
        anchor_generator: for the levels of ``in_features``.
        matcher: labels anchors.
        coder: deltas to boxes.
        in_features: names of the levels.
        batch_size_per_image, positive_fraction: sampled anchors per image and quota of positives.
        pre_nms_topk, post_nms_topk: (training, test) proposals per level before, and per image after NMS.
        nms_thresh: IoU of NMS within a level.
        min_box_size: proposals need both sides longer than this, in pixels.
        boundary_thresh: if >= 0, anchors that leave the image by more than this many pixels are not trained.
        loss_weight_cls, loss_weight_loc: factors of the losses.
        smooth_l1_beta: 0 for plain L1.
        box_loss: see :func:`gn_det.modeling.boxes.regression_sum`.
    """

    def __init__(
        self,
        *,
        head: RPNHead,
        anchor_generator: AnchorGenerator,
        matcher: Matcher,
        coder: BoxCoder,
        in_features: Sequence[str],
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        pre_nms_topk: tuple[int, int] = (12000, 6000),
        post_nms_topk: tuple[int, int] = (2000, 1000),
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        boundary_thresh: float = -1.0,
        loss_weight_cls: float = 1.0,
        loss_weight_loc: float = 1.0,
        smooth_l1_beta: float = 0.0,
        box_loss: str = "smooth_l1",
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.matcher = matcher
        self.coder = coder
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = float(min_box_size)
        self.boundary_thresh = boundary_thresh
        self.loss_weights = {"loss_rpn_cls": loss_weight_cls, "loss_rpn_loc": loss_weight_loc}
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss = box_loss

    def forward(
        self,
        features: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets] | None = None,
        metrics: Metrics | None = None,
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """Proposals of B images, and losses when training (then ``targets`` is needed).

        Raises:
            FloatingPointError: training, and a proposal or its logit is not finite.
        """
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator([(f.shape[-2], f.shape[-1]) for f in levels])
        logit_maps, delta_maps = self.rpn_head(levels)
        # (B, A, H, W) and (B, A * 4, H, W) to (B, Ri) and (B, Ri, 4) in the order of the anchors.
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logit_maps]
        deltas = [
            x.view(x.shape[0], -1, 4, x.shape[-2], x.shape[-1]).permute(0, 3, 4, 1, 2).flatten(1, -2)
            for x in delta_maps
        ]
        losses = {}
        if self.training:
            if targets is None:
                raise ValueError("training needs targets")
            losses = self.losses(anchors, logits, deltas, targets, metrics or Metrics())
        return self.propose(anchors, logits, deltas, image_sizes), losses

    @torch.no_grad()
    def sample_anchors(self, anchors: Tensor, target: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled positives and negatives of one image as sorted indices into R, and the positives' boxes (P, 4)."""
        matches, labels = self.matcher(box_ops.pairwise_iou(target.boxes, anchors))
        if self.boundary_thresh >= 0:
            labels.masked_fill_(~box_ops.inside(anchors, target.image_size, self.boundary_thresh), IGNORE)
        positive, negative = sample_labels(labels, self.batch_size_per_image, self.positive_fraction, 0)
        # Losses are summed in anchor order.
        positive = positive.sort().values
        if len(target.boxes) == 0:
            return positive, negative, anchors.new_zeros((len(positive), 4))
        return positive, negative, target.boxes[matches[positive]]

    def losses(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Sequence[Targets],
        metrics: Metrics,
    ) -> dict[str, Tensor]:
        """Objectness (binary cross entropy) and localization loss of the sampled anchors.

        Both are sums divided by ``batch_size_per_image`` times B, however many anchors were found.
        """
        all_anchors = torch.cat(list(anchors))
        num_anchors, num_images = len(all_anchors), len(targets)
        labels = torch.full((num_images, num_anchors), IGNORE, dtype=torch.int8, device=all_anchors.device)
        positives, references, boxes = [], [], []
        num_negative = 0
        for i, target in enumerate(targets):
            positive, negative, matched = self.sample_anchors(all_anchors, target)
            labels[i, positive] = 1
            labels[i, negative] = 0
            positives.append(positive + i * num_anchors)
            references.append(all_anchors[positive])
            boxes.append(matched)
            num_negative += len(negative)
        positive_index = torch.cat(positives)
        metrics.put("rpn/num_pos_anchors", len(positive_index) / num_images)
        metrics.put("rpn/num_neg_anchors", num_negative / num_images)

        sampled = (labels.view(-1) >= 0).nonzero().squeeze(1)
        flat_logits = torch.cat(list(logits), dim=1).view(-1)
        flat_deltas = torch.cat(list(deltas), dim=1).view(-1, 4)
        loss_cls = F.binary_cross_entropy_with_logits(
            flat_logits[sampled], labels.view(-1)[sampled].float(), reduction="sum"
        )
        loss_loc = box_ops.regression_sum(
            flat_deltas[positive_index],
            torch.cat(references),
            torch.cat(boxes),
            coder=self.coder,
            kind=self.box_loss,
            beta=self.smooth_l1_beta,
        )
        normalizer = self.batch_size_per_image * num_images
        losses = {"loss_rpn_cls": loss_cls / normalizer, "loss_rpn_loc": loss_loc / normalizer}
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    @torch.no_grad()
    def propose(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Proposals]:
        """Best anchors of each level by logit, decoded, clipped, NMS per level, best of all levels per image."""
        top_boxes, top_logits, level_ids = [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas)):
            num = min(logit.shape[1], self.pre_nms_topk[self.training])
            scores, index = logit.topk(num, dim=1)
            # Only the chosen ones are decoded: element-wise, so the numbers are those of decoding everything.
            chosen = delta.gather(1, index[:, :, None].expand(-1, -1, 4))
            boxes = self.coder.decode(chosen.flatten(0, 1), anchor[index.flatten()])
            top_boxes.append(boxes.view(len(image_sizes), num, 4))
            top_logits.append(scores)
            level_ids.append(torch.full((num,), level, dtype=torch.int64, device=logit.device))
        boxes = torch.cat(top_boxes, dim=1)
        scores = torch.cat(top_logits, dim=1).float()
        levels = torch.cat(level_ids)
        return [self._select(boxes[i], scores[i], levels, size) for i, size in enumerate(image_sizes)]

    def _select(self, boxes: Tensor, scores: Tensor, levels: Tensor, image_size: tuple[int, int]) -> Proposals:
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
        boxes = box_ops.clip(boxes, image_size)
        good = finite & box_ops.nonempty(boxes, self.min_box_size)
        if not good.all():  # where all are good, the host has waited for the device once
            if self.training and not finite.all():
                raise FloatingPointError("RPN predictions hold inf or nan: training has diverged")
            index = good.nonzero().squeeze(1)
            boxes, scores, levels = boxes[index], scores[index], levels[index]
        keep = batched_nms(boxes, scores, levels, self.nms_thresh)[: self.post_nms_topk[self.training]]
        return Proposals(image_size, boxes[keep], scores[keep])
