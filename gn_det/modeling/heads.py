"""Box head, box predictor and mask head.

Shape letters: P RoIs of all images (may be 0), C channels, S side of the pooled grid, K foreground classes; class K is
background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from gn_det.kernels import saving
from gn_det.modeling import boxes as box_ops
from gn_det.modeling.boxes import BoxCoder
from gn_det.modeling.layers import ConvNorm, c2_msra_fill, c2_xavier_fill, normal_fill
from gn_det.modeling.metrics import Metrics
from gn_det.norm import NormSpec
from gn_det.structures import Detections


def _add_convs(module: nn.Module, prefix: str, in_channels: int, conv_dims: Sequence[int], norm: NormSpec) -> list[str]:
    """Add 3x3 convolutions with norm and ReLU to ``module``, named ``prefix`` and a number; returns their names."""
    names = []
    for k, dim in enumerate(conv_dims, start=1):
        names.append(f"{prefix}{k}")
        conv = ConvNorm(in_channels, dim, kernel_size=3, padding=1, bias=not norm, norm=norm, relu=True)
        module.add_module(names[-1], conv)
        in_channels = dim
    return names


class BoxHead(nn.Module):
    """3x3 convolutions with norm and ReLU, then fully connected layers with ReLU ("2fc", "4conv1fc").

    Args:
        in_channels, resolution: C and S of the pooled features.
        conv_dims: output channels of the convolutions.
        fc_dims: output sizes of the fully connected layers, at least one.
        norm: of the convolutions, see :data:`gn_det.norm.NormSpec`; without one they have biases.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        *,
        conv_dims: Sequence[int] = (),
        fc_dims: Sequence[int] = (1024, 1024),
        norm: NormSpec = None,
    ) -> None:
        super().__init__()
        self.convs = _add_convs(self, "conv", in_channels, conv_dims, norm)
        size = (conv_dims[-1] if conv_dims else in_channels) * resolution * resolution
        self.fcs: list[str] = []
        for k, dim in enumerate(fc_dims, start=1):
            self.fcs.append(f"fc{k}")
            self.add_module(self.fcs[-1], nn.Linear(size, dim))
            size = dim
        for name in self.convs:
            c2_msra_fill(getattr(self, name))
        for name in self.fcs:
            c2_xavier_fill(getattr(self, name))
        #: length of the output vector
        self.output_size = size

    def forward(self, x: Tensor) -> Tensor:
        """(P, C, S, S) to (P, output_size)."""
        for name in self.convs:
            x = getattr(self, name)(x)
        with saving(x):
            x = torch.flatten(x, 1)
            for name in self.fcs:
                x = F.relu_(getattr(self, name)(x))
        return x


class BoxPredictor(nn.Module):
    """Class scores and box deltas of RoIs, their losses, and detections from them.

    Args:
        input_size: length of the RoI vectors.
        num_classes: K.
        coder: deltas to boxes.
        score_thresh, nms_thresh, topk: detections need a score above the first, survive class-wise NMS at the
            second, and at most ``topk`` per image are kept (all of them if negative).
        loss_weight_box: factor of loss_box_reg.
        smooth_l1_beta: 0 for plain L1.
        box_loss: see :func:`gn_det.modeling.boxes.regression_sum`.
        class_agnostic: one box for all classes, not one a class.
        class_weights: of the K + 1 classes in loss_cls, background last; None for the plain mean.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        *,
        coder: BoxCoder,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        topk: int = 100,
        loss_weight_box: float = 1.0,
        smooth_l1_beta: float = 0.0,
        box_loss: str = "smooth_l1",
        class_agnostic: bool = False,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_score = nn.Linear(input_size, num_classes + 1)
        self.num_boxes = 1 if class_agnostic else num_classes
        self.bbox_pred = nn.Linear(input_size, self.num_boxes * 4)
        normal_fill(self.cls_score, 0.01)
        normal_fill(self.bbox_pred, 0.001)
        self.coder = coder
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.topk = topk
        self.loss_weight_box = loss_weight_box
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss = box_loss
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)  # the configuration owns them

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(P, input_size) to logits (P, K + 1) and deltas (P, K * 4), or (P, 4) if class-agnostic."""
        return self.cls_score(x), self.bbox_pred(x)

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, classes: Tensor, metrics: Metrics
    ) -> dict[str, Tensor]:
        """Cross entropy over all P RoIs (a weighted mean with ``class_weights``), box loss of the foreground over P.

        Args:
            logits, deltas: from :meth:`forward`.
            boxes, gt_boxes: (P, 4) RoIs and their ground truth (meaningless for background).
            classes: (P,) in [0, K].
            metrics: receives accuracies.
        """
        _put_accuracies(logits, classes, metrics)
        foreground = (classes < self.num_classes).nonzero().squeeze(1)
        predicted = self._of_class(deltas, foreground, classes[foreground])
        num = classes.numel()
        loss_cls = F.cross_entropy(logits, classes, self.class_weights) if num else logits.sum() * 0.0
        loss_box = box_ops.regression_sum(
            predicted,
            boxes[foreground],
            gt_boxes[foreground],
            coder=self.coder,
            kind=self.box_loss,
            beta=self.smooth_l1_beta,
        )
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box / max(num, 1) * self.loss_weight_box}

    def _of_class(self, boxes: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """(N, 4) boxes or deltas of the given rows and classes, from (P, K * 4) or class-agnostic (P, 4)."""
        return boxes.view(-1, self.num_boxes, 4)[rows, classes if self.num_boxes > 1 else 0]

    def detect(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Detections of each image at network resolution, without masks, best first."""
        counts = [len(b) for b in boxes]
        decoded = torch.split(self.coder.decode(deltas, torch.cat(list(boxes))), counts)
        scores = torch.split(F.softmax(logits.float(), dim=-1), counts)
        return [self.select(b, s, size) for b, s, size in zip(decoded, scores, image_sizes)]

    def select(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Detections:
        """Detections of one image from its decoded boxes (P, K * 4) or (P, 4) and scores (P, K + 1)."""
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        scores = scores[:, :-1]
        roi, cls = ((scores > self.score_thresh) & finite[:, None]).nonzero(as_tuple=True)
        scores = scores[roi, cls]
        boxes = box_ops.clip(self._of_class(boxes, roi, cls), image_size)
        keep = batched_nms(boxes, scores, cls, self.nms_thresh)
        if self.topk >= 0:
            keep = keep[: self.topk]
        return Detections(image_size, boxes[keep], scores[keep], cls[keep])


def _put_accuracies(logits: Tensor, classes: Tensor, metrics: Metrics) -> None:
    if classes.numel() == 0:
        return
    with torch.no_grad():
        predicted = logits.argmax(dim=1)
        background = logits.shape[1] - 1
        foreground = classes < background
        right = predicted == classes
        count = foreground.sum()  # 0 / 0 = nan: not defined this time
        metrics.put("fast_rcnn/cls_accuracy", right.float().mean())
        metrics.put("fast_rcnn/fg_cls_accuracy", (right & foreground).sum() / count)
        metrics.put("fast_rcnn/false_negative", ((predicted == background) & foreground).sum() / count)


class MaskHead(nn.Module):
    """3x3 convolutions with norm and ReLU, a 2x2 deconvolution with ReLU, one mask per class.

    Args:
        in_channels: C of the pooled features.
        num_classes: K, or 1 for one mask for all classes.
        conv_dims: output channels of the convolutions, and last of the deconvolution.
        norm: of the convolutions, see :data:`gn_det.norm.NormSpec`; without one they have biases.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        conv_dims: Sequence[int] = (256, 256, 256, 256, 256),
        norm: NormSpec = None,
    ) -> None:
        super().__init__()
        self.convs = _add_convs(self, "mask_fcn", in_channels, conv_dims[:-1], norm)
        channels = conv_dims[-2] if len(conv_dims) > 1 else in_channels
        self.deconv = nn.ConvTranspose2d(channels, conv_dims[-1], kernel_size=2, stride=2)
        self.predictor = nn.Conv2d(conv_dims[-1], num_classes, kernel_size=1)
        for name in self.convs:
            c2_msra_fill(getattr(self, name))
        c2_msra_fill(self.deconv)
        normal_fill(self.predictor, 0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(P, C, S, S) to logits (P, K, 2 * S, 2 * S)."""
        for name in self.convs:
            x = getattr(self, name)(x)
        with saving(x):
            x = self.deconv(x)
        logits: Tensor = self.predictor(F.relu_(x))
        return logits


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, metrics: Metrics) -> Tensor:
    """Binary cross entropy of each foreground RoI's mask of its own class.

    Args:
        logits: (P, K, S, S) of the foreground RoIs, or (P, 1, S, S) if class-agnostic.
        classes: (P,) in [0, K).
        targets: (P, S, S) bool.
        metrics: receives accuracies.

    Returns:
        Mean over all pixels; 0, with gradients, where P is 0.
    """
    if logits.shape[0] == 0:
        return logits.sum() * 0
    own = _masks_of(logits, classes)
    with torch.no_grad():
        wrong = (own > 0) != targets
        num_true = targets.sum()
        metrics.put("mask_rcnn/accuracy", 1 - wrong.float().mean())
        metrics.put("mask_rcnn/false_positive", (wrong & ~targets).sum() / (targets.numel() - num_true).clamp(min=1))
        metrics.put("mask_rcnn/false_negative", (wrong & targets).sum() / num_true.clamp(min=1))
    return F.binary_cross_entropy_with_logits(own, targets.to(torch.float32))


def mask_probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """(P, K, S, S) logits and (P,) predicted classes to float32 (P, S, S) probabilities of those classes' masks."""
    return _masks_of(logits, classes).float().sigmoid()


def _masks_of(logits: Tensor, classes: Tensor) -> Tensor:
    if logits.shape[1] == 1:  # class-agnostic
        return logits[:, 0]
    return logits[torch.arange(logits.shape[0], device=logits.device), classes]
