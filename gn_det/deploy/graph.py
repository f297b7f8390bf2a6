"""A detector as one graph of tensor operations for torch.export.

It computes the same as :class:`gn_det.modeling.mask_rcnn.MaskRCNN`, with the same layers. Data-dependent Python code
there (loops over images and levels, tests for emptiness) is replaced by operations on a whole batch.

Shape letters: B images, H, W rows and columns of the padded input, P proposals and N detections of all images, K
classes, S side of a mask; G groups of R boxes, C lists of scores over the boxes of a group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from gn_det.modeling.heads import mask_probabilities
from gn_det.modeling.layers import fold_weights
from gn_det.modeling.mask_rcnn import MaskRCNN
from gn_det.modeling.poolers import RoIPooler
from gn_det.modeling.roi_heads import Res5RoIHeads, StandardRoIHeads
from gn_det.norm import FrozenBatchNorm2d, GroupNorm

#: Up to this many boxes, torchvision's batched_nms separates groups on a CPU by shifting boxes in float32.
_SHIFTED = 1000

_NONE = float("-inf")

GroupNMS = Callable[[Tensor, Tensor, float], Tensor]


def portable_nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Suppress boxes within each group and list, with torchvision's operator.

    Args:
        boxes: (G, R, 4), no coordinate below 0.
        scores: (G, C, R); -inf leaves a box out.
        iou: a box that overlaps a better one by more is dropped.

    Returns:
        Group, list and row of the kept boxes, (n, 3) int64 in any order.
    """
    found = (scores > _NONE).nonzero()
    group, part, row = found.unbind(1)
    # Shift groups apart; float64 does not round.
    shift = (group * scores.shape[1] + part).double() * (F.pad(boxes.double().flatten(), (0, 1)).amax() + 1)
    return found[nms(boxes[group, row].double() + shift[:, None], scores[group, part, row].double(), iou)]


#: :func:`portable_nms` as a custom operator, which the ONNX exporter translates to NonMaxSuppression.
onnx_nms = torch.library.custom_op("gn_det::onnx_nms", portable_nms, mutates_args=())


@onnx_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


class _PlainGroupNorm(nn.Module):
    """GroupNorm without checks of the batch size, which is unknown in a graph."""

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _Affine(nn.Module):
    """BatchNorm with fixed statistics as a scale and a shift per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d) -> None:
        super().__init__()
        frozen = norm if isinstance(norm, FrozenBatchNorm2d) else FrozenBatchNorm2d.from_batch_norm(norm)
        scale = frozen.weight * (frozen.running_var + frozen.eps).rsqrt()
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", (frozen.bias - frozen.running_mean * scale).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _graph_norms(module: nn.Module) -> None:
    """Replace the norms in ``module`` by exportable ones."""
    for name, child in module.named_children():
        if isinstance(child, GroupNorm):
            module.add_module(name, _PlainGroupNorm(child))
        elif isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)):
            module.add_module(name, _Affine(child))
        else:
            _graph_norms(child)


class GraphDetector(nn.Module):
    """``model`` as a function from padded images to the detections of all images, in image order.

    Args:
        model: a model in evaluation mode, which is copied.
        image_format: INPUT.FORMAT of the model. The graph takes RGB (or L).
        half: compute convolutions and fully connected layers in float16; boxes and scores stay float32.
        paste: return masks at the size of the input instead of (S, S) within the boxes.
        suppress: :func:`portable_nms` or :data:`onnx_nms`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: MaskRCNN,
        image_format: str,
        *,
        half: bool = False,
        paste: bool = False,
        suppress: GroupNMS = portable_nms,
    ) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
        fold_weights(model)
        _graph_norms(model)
        for part in model.modules():
            if isinstance(part, RoIPooler):
                part.fused = "off"  # use torchvision's operator, which also exists in ONNX
        self.backbone, self.rpn, self.roi_heads = model.backbone, model.proposal_generator, model.roi_heads
        self.register_buffer("mean", model.pixel_mean)
        self.register_buffer("std", model.pixel_std)
        self.flip = image_format == "BGR"
        self.dtype = torch.float16 if half else torch.float32
        for part in (self.backbone, self.rpn.rpn_head, self.roi_heads):
            part.to(self.dtype)
        self.paste = paste
        self.suppress = suppress
        predictor = self.roi_heads.predictors[-1]
        self.topk = predictor.topk if predictor.topk >= 0 else predictor.num_classes * self.rpn.post_nms_topk[False]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        masks = () if self.roi_heads.mask_head is None else ("masks",)
        return ("boxes", "scores", "classes", *masks, "counts")

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            image: (B, H, W, 3) uint8 RGB, or (B, H, W, 1) for a model of gray images; H and W are multiples of the
                backbone's ``size_divisibility``.
            size: (B, 2) int64, rows and columns of each image; the padding to the right and below is ignored.

        Returns:
            Boxes (N, 4) float32 x0, y0, x1, y1 in pixels of the input, scores (N,) float32, classes (N,) int64, masks
            (N, S, S) float32 probabilities within the boxes or (N, H, W) bool, and the number of detections of each
            image (B,) int64. Those of an image are consecutive, best first.
        """
        limit = size.flip(1).repeat(1, 2).to(torch.float32)  # (B, 4) width, height, width, height
        features = self.backbone(self.preprocess(image, size).to(self.dtype))
        rois, owner = self.propose([features[name] for name in self.rpn.in_features], limit)
        levels = [features[name] for name in self.roi_heads.in_features]
        boxes, scores, classes, owner = self.detect(*self.refine(levels, rois, owner, limit), owner, limit)
        counts = (owner == _range(size.shape[0], size)[:, None]).sum(1)
        if self.roi_heads.mask_head is None:
            return boxes, scores, classes, counts
        masks = mask_probabilities(self.roi_heads.mask_head(self.mask_features(levels, boxes, owner)), classes)
        if self.paste:
            masks = paste(masks, boxes, image.shape[1], image.shape[2])
        return boxes, scores, classes, masks, counts

    def preprocess(self, image: Tensor, size: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalized, 0 outside the images."""
        x = image.permute(0, 3, 1, 2).contiguous()
        if self.flip:
            x = x.flip(1)
        x = (x.to(torch.float32) - self.mean) / self.std
        rows = _range(x.shape[2], size) < size[:, :1]
        columns = _range(x.shape[3], size) < size[:, 1:]
        return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], x, 0.0)

    def propose(self, levels: Sequence[Tensor], limit: Tensor) -> tuple[Tensor, Tensor]:
        """Return proposals (P, 4) and the image of each; see :meth:`gn_det.modeling.rpn.RPN.propose`."""
        rpn, num = self.rpn, self.rpn.pre_nms_topk[False]
        anchors = rpn.anchor_generator([(f.shape[-2], f.shape[-1]) for f in levels])
        top_boxes, top_scores = [], []
        for anchor, logit, delta in zip(anchors, *rpn.rpn_head(levels)):
            logit = logit.permute(0, 2, 3, 1).flatten(1)
            delta = delta.view(delta.shape[0], -1, 4, *delta.shape[2:]).permute(0, 3, 4, 1, 2).flatten(1, -2)
            # A level may have fewer than num anchors; the rest gets score -inf and is dropped.
            scores, index = F.pad(logit.float(), (0, num), value=_NONE).topk(num, dim=1)
            index = index.clamp(max=logit.shape[1] - 1)
            chosen = delta.gather(1, index[:, :, None].expand(-1, -1, 4))
            boxes = rpn.coder.decode(chosen.flatten(0, 1), anchor[index.flatten()])
            top_boxes.append(boxes.view(-1, num, 4))
            top_scores.append(scores)
        boxes, scores = torch.stack(top_boxes, dim=1), torch.stack(top_scores, dim=1)  # (B, levels, num ...)
        finite = torch.isfinite(boxes).all(-1) & torch.isfinite(scores)
        boxes = clip(boxes, limit[:, None, None])
        good = finite & (boxes[..., 2:] - boxes[..., :2] > rpn.min_box_size).all(-1)
        shifted = boxes + shift(boxes, good, len(levels))[:, :, None, None]
        scores = torch.where(good, scores, _NONE).flatten(0, 1)
        group, _, row = self.suppress(shifted.flatten(0, 1), scores[:, None], rpn.nms_thresh).unbind(1)
        owner, best = best_of(scores[group, row], group // len(levels), limit.shape[0], rpn.post_nms_topk[False])
        return boxes.flatten(0, 1)[group[best], row[best]], owner

    def refine(self, levels: Sequence[Tensor], rois: Tensor, owner: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (P, K * 4) or (P, 4) that the last box predictor makes of the P proposals, and scores (P, K + 1)."""
        heads, boxes, total = self.roi_heads, rois, rois.new_zeros(())
        for stage, predictor in enumerate(heads.predictors):
            if stage:
                boxes = clip(boxes, limit[owner])
            if isinstance(heads, Res5RoIHeads):
                x: Tensor = heads.res5(self.pool(heads.pooler, levels, boxes, owner)).mean(dim=(2, 3))
            else:
                assert isinstance(heads, StandardRoIHeads)
                x = heads.stages[stage][0](self.pool(heads.box_pooler, levels, boxes, owner))
            logits, deltas = predictor(x)
            boxes, total = predictor.coder.decode(deltas, boxes), total + F.softmax(logits.float(), dim=-1)
        return boxes, total if stage == 0 else total * (1.0 / (stage + 1))

    def mask_features(self, levels: Sequence[Tensor], boxes: Tensor, owner: Tensor) -> Tensor:
        """Return the input of the mask head for each of the N detections."""
        heads = self.roi_heads
        if isinstance(heads, Res5RoIHeads):
            x: Tensor = heads.res5(self.pool(heads.pooler, levels, boxes, owner))
            return x
        assert isinstance(heads, StandardRoIHeads) and heads.mask_pooler is not None
        return self.pool(heads.mask_pooler, levels, boxes, owner)

    def pool(self, pooler: RoIPooler, levels: Sequence[Tensor], rois: Tensor, owner: Tensor) -> Tensor:
        """Return RoI features (P, C, S, S), each from its level; RoIAlign computes in float32."""
        rois = torch.cat([owner[:, None].to(rois.dtype), rois], dim=1)
        levels = [level.float() for level in levels]
        if len(levels) == 1:
            return pooler.pool(levels[0], rois, pooler.scales[0]).to(self.dtype)
        level_of = pooler.levels(rois[:, 1:])
        chosen = [(level_of == k).nonzero().squeeze(1) for k in range(len(levels))]
        pooled = torch.cat([pooler.pool(f, rois[i], s) for f, i, s in zip(levels, chosen, pooler.scales)])
        order = torch.cat(chosen)
        back = torch.zeros_like(level_of).scatter(0, order, _range(order.shape[0], order))
        return pooled[back].to(self.dtype)

    def detect(
        self, boxes: Tensor, scores: Tensor, owner: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes, scores, classes and images of the detections, as ``BoxPredictor.select`` chooses them."""
        predictor = self.roi_heads.predictors[-1]
        finite = torch.isfinite(boxes).all(1) & torch.isfinite(scores).all(1)
        boxes = clip(boxes.view(boxes.shape[0], -1, 4), limit[owner][:, None]).transpose(0, 1)  # (K, P, 4)
        if predictor.num_boxes < predictor.num_classes:  # class-agnostic
            boxes = boxes.expand(predictor.num_classes, -1, -1)
        scores = scores[:, :-1].t()  # (K, P)
        mine = owner == _range(limit.shape[0], owner)[:, None]  # (B, P)
        good = mine[:, None] & (finite & (scores > predictor.score_thresh))  # (B, K, P)
        by_image = shift(boxes.expand(limit.shape[0], -1, -1, -1), good, predictor.num_classes)  # (B, K)
        shifted = boxes + by_image.t()[:, owner, None]
        lists = torch.where(good, scores, _NONE).transpose(0, 1)  # (K, B, P)
        cls, image, roi = self.suppress(shifted, lists, predictor.nms_thresh).unbind(1)
        owner, best = best_of(scores[cls, roi], image, limit.shape[0], self.topk)
        cls, roi = cls[best], roi[best]
        return boxes[cls, roi], scores[cls, roi], cls, owner


def clip(boxes: Tensor, limit: Tensor) -> Tensor:
    """Clip ``boxes`` (..., 4) to images of ``limit`` (..., 4): width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), limit)


def shift(boxes: Tensor, good: Tensor, num_groups: int) -> Tensor:
    """Return (B, groups) the shift of each group's boxes in batched_nms, so that IoUs are rounded equally.

    Args:
        boxes: (B, groups, R, 4).
        good: (B, groups, R), the valid boxes.
    """
    inside = torch.where(good[..., None], boxes, 0.0).flatten(1)
    highest = F.pad(inside, (0, 1)).amax(1)  # padded: an image may have no box
    step = torch.where(good.flatten(1).sum(1) <= _SHIFTED, highest + 1, 0.0)
    return step[:, None] * _range(num_groups, step)


def best_of(scores: Tensor, owner: Tensor, num_images: int, topk: int) -> tuple[Tensor, Tensor]:
    """Return image and position in ``scores`` (n,) of the ``topk`` best of each image, by image, best first."""
    table = torch.where(owner == _range(num_images, owner)[:, None], scores, _NONE)
    best, position = F.pad(table, (0, topk), value=_NONE).topk(topk, dim=1)
    image, rank = (best > _NONE).nonzero().unbind(1)
    return image, position[image, rank]


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (N, height, width) bool; see :func:`gn_det.modeling.postprocess.paste_masks`.

    Bilinear sampling is separable: one matrix of weights for the rows and one for the columns of each mask.
    """

    def weights(low: Tensor, high: Tensor, pixels: int) -> Tensor:
        side = masks.shape[-1]
        at = (_range(pixels, boxes) + 0.5 - low[:, None]) / (high - low)[:, None] * side - 0.5
        return (1 - (at[:, :, None] - _range(side, boxes)).abs()).clamp(min=0)

    rows, columns = weights(boxes[:, 1], boxes[:, 3], height), weights(boxes[:, 0], boxes[:, 2], width)
    return rows @ masks @ columns.transpose(1, 2) >= 0.5


def _range(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, dtype=like.dtype, device=like.device)
