"""Pure functions on boxes.

Shape letters: N, M boxes; K classes. Boxes are float32 (x0, y0, x1, y1) in pixels, continuous coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

#: Decoded boxes grow at most by 1000 / 16 per side: larger deltas are clamped before exp.
SCALE_CLAMP = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """(N, 4) to (N,) areas in square pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A copy of (N, 4) boxes with corners moved into the (H, W) image."""
    height, width = image_size
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    return torch.stack(
        (x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)),
        dim=1,
    )


def nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    """(N,) bool: both sides are longer than ``threshold`` pixels."""
    return (boxes[:, 2] - boxes[:, 0] > threshold) & (boxes[:, 3] - boxes[:, 1] > threshold)


def inside(boxes: Tensor, image_size: tuple[int, int], margin: float) -> Tensor:
    """(N,) bool: the box leaves the (H, W) image by at most ``margin`` pixels."""
    height, width = image_size
    return (
        (boxes[:, 0] >= -margin)
        & (boxes[:, 1] >= -margin)
        & (boxes[:, 2] < width + margin)
        & (boxes[:, 3] < height + margin)
    )


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of (N, 4) and (M, 4) boxes as (N, M); pairs that do not overlap get exactly 0, empty boxes too."""
    inter = torch.min(a[:, None, 2], b[:, 2]).sub_(torch.max(a[:, None, 0], b[:, 0])).clamp_(min=0)
    inter *= torch.min(a[:, None, 3], b[:, 3]).sub_(torch.max(a[:, None, 1], b[:, 1])).clamp_(min=0)
    union = (area(a)[:, None] + area(b)).sub_(inter)
    return torch.where(inter > 0, inter / union, inter.new_zeros(()))


@dataclass(frozen=True)
class BoxCoder:
    """Boxes relative to reference boxes as deltas (dx, dy, dw, dh), R-CNN's parameterization.

    Attributes:
        weights: factors of the four deltas.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(self, references: Tensor, targets: Tensor) -> Tensor:
        """Deltas (N, 4) that move ``references`` (N, 4) onto ``targets`` (N, 4)."""
        ref_w = references[:, 2] - references[:, 0]
        ref_h = references[:, 3] - references[:, 1]
        ref_x = references[:, 0] + 0.5 * ref_w
        ref_y = references[:, 1] + 0.5 * ref_h
        tgt_w = targets[:, 2] - targets[:, 0]
        tgt_h = targets[:, 3] - targets[:, 1]
        tgt_x = targets[:, 0] + 0.5 * tgt_w
        tgt_y = targets[:, 1] + 0.5 * tgt_h
        wx, wy, ww, wh = self.weights
        return torch.stack(
            (
                wx * (tgt_x - ref_x) / ref_w,
                wy * (tgt_y - ref_y) / ref_h,
                ww * torch.log(tgt_w / ref_w),
                wh * torch.log(tgt_h / ref_h),
            ),
            dim=1,
        )

    def decode(self, deltas: Tensor, references: Tensor) -> Tensor:
        """Boxes (N, K * 4) from deltas (N, K * 4) of any dtype and references (N, 4); always float32.

        In bf16 a corner can be off by 12 pixels, so nothing here happens in the deltas' dtype.
        """
        deltas = deltas.float()
        references = references.float()
        w = references[:, 2] - references[:, 0]
        h = references[:, 3] - references[:, 1]
        x = references[:, 0] + 0.5 * w
        y = references[:, 1] + 0.5 * h
        wx, wy, ww, wh = self.weights
        center_x = deltas[:, 0::4] / wx * w[:, None] + x[:, None]
        center_y = deltas[:, 1::4] / wy * h[:, None] + y[:, None]
        half_w = 0.5 * (torch.exp((deltas[:, 2::4] / ww).clamp(max=SCALE_CLAMP)) * w[:, None])
        half_h = 0.5 * (torch.exp((deltas[:, 3::4] / wh).clamp(max=SCALE_CLAMP)) * h[:, None])
        corners = (center_x - half_w, center_y - half_h, center_x + half_w, center_y + half_h)
        return torch.stack(corners, dim=-1).reshape(deltas.shape)


#: Losses of decoded boxes, by their names in BBOX_REG_LOSS_TYPE.
IOU_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}


def regression_sum(
    deltas: Tensor, references: Tensor, targets: Tensor, *, coder: BoxCoder, kind: str = "smooth_l1", beta: float = 0.0
) -> Tensor:
    """Sum of the regression losses of N boxes.

    Args:
        deltas: (N, 4) predictions relative to ``references``.
        references, targets: (N, 4) proposals or anchors, and the ground truth of each.
        coder: deltas to boxes.
        kind: "smooth_l1" of the deltas, or one of :data:`IOU_LOSSES` of the decoded boxes.
        beta: of smooth L1, see :func:`smooth_l1_sum`.
    """
    if kind == "smooth_l1":
        return smooth_l1_sum(deltas, coder.encode(references, targets), beta)
    loss: Tensor = IOU_LOSSES[kind](coder.decode(deltas, references), targets, reduction="sum")
    return loss


def smooth_l1_sum(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of smooth L1 over all elements; below ``beta`` 1e-5 it is plain L1."""
    distance = torch.abs(prediction - target)
    if beta < 1e-5:
        return distance.sum()
    return torch.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta).sum()
