"""Mask R-CNN (He et al. 2017): backbone, RPN and RoI heads from images to losses or detections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gn_det.modeling.fpn import FPN
from gn_det.modeling.metrics import Metrics
from gn_det.modeling.postprocess import resize_detections
from gn_det.modeling.resnet import ResNet
from gn_det.modeling.roi_heads import RoIHeads
from gn_det.modeling.rpn import RPN, Proposals
from gn_det.structures import Detections, Sample, Targets


class MaskRCNN(nn.Module):
    """The detector. Parameter and buffer names are those of Detectron2's GeneralizedRCNN.

    Args:
        backbone: FPN, or ResNet for C4.
        proposal_generator: RPN.
        roi_heads: standard or res5 heads.
        pixel_mean, pixel_std: per channel, in the channel order and range of the images.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: FPN | ResNet,
        proposal_generator: RPN,
        roi_heads: RoIHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        # Not saved: the configuration owns them.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self._unit_std = all(s == 1 for s in pixel_std)
        self._metrics = Metrics()

    @property
    def device(self) -> torch.device:
        """Where the model is; samples may be anywhere."""
        return self.pixel_mean.device

    def pop_metrics(self) -> dict[str, float]:
        """Means of the training scalars (accuracies, numbers of samples) since the last call."""
        return self._metrics.pop()

    @contextmanager
    def metrics_apart(self) -> Iterator[None]:
        """Within the context, forward passes leave no training scalars."""
        kept, self._metrics = self._metrics, Metrics()
        try:
            yield
        finally:
            self._metrics = kept

    def forward(self, batch: Sequence[Sample]) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            batch: samples with ``image`` (3, H, W), any sizes; ``targets`` in training; ``height`` and ``width``
                of the wanted detections in evaluation (H and W where missing).

        Returns:
            Training: ``loss_cls``, ``loss_box_reg``, ``loss_mask`` (with a mask head), ``loss_rpn_cls``,
            ``loss_rpn_loc``, scalars. Evaluation: detections per sample with pasted masks.

        Raises:
            FloatingPointError: training has diverged (non-finite proposals).
        """
        if not self.training:
            return self.detect(batch)
        missing = [s.get("file_name", i) for i, s in enumerate(batch) if "targets" not in s]
        if missing:
            raise ValueError(f"training needs targets; samples without: {missing}")
        if self.roi_heads.mask_head is not None:
            missing = [
                s.get("file_name", i) for i, s in enumerate(batch) if len(s["targets"]) and s["targets"].masks is None
            ]
            if missing:
                raise ValueError(f"MODEL.MASK_ON needs targets with masks; samples without: {missing}")
        targets: list[Targets] = [s["targets"].to(self.device) for s in batch]
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)
        proposals, rpn_losses = self.proposal_generator(features, sizes, targets, self._metrics)
        _, losses = self.roi_heads(features, proposals, targets, self._metrics)
        return {**losses, **rpn_losses}

    @torch.no_grad()
    def detect(self, batch: Sequence[Sample], least: tuple[int, int] = (0, 0)) -> list[Detections]:
        """Detections of each sample at its ``height`` and ``width``; see :meth:`forward` and :meth:`preprocess`."""
        _, detections = self.detect_raw(batch, least)
        return [
            resize_detections(d, s.get("height", d.image_size[0]), s.get("width", d.image_size[1]))
            for d, s in zip(detections, batch)
        ]

    @torch.no_grad()
    def detect_raw(
        self, batch: Sequence[Sample], least: tuple[int, int] = (0, 0)
    ) -> tuple[list[Proposals], list[Detections]]:
        """Proposals and detections at network resolution; masks are (N, S, S) probabilities within the boxes."""
        images, sizes = self.preprocess(batch, least)
        features = self.backbone(images)
        proposals, _ = self.proposal_generator(features, sizes)
        detections, _ = self.roi_heads(features, proposals)
        return proposals, detections

    @torch.no_grad()
    def preprocess(
        self, batch: Sequence[Sample], least: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalize, then pad with zeros at the bottom and right to one size that suits the backbone.

        Args:
            batch: samples with ``image``.
            least: height and width of the result, at least.

        Returns:
            Images (B, 3, H, W) float32 on the model's device, and the (H, W) of each before padding.
        """
        sizes = [(s["image"].shape[-2], s["image"].shape[-1]) for s in batch]
        height, width = (max(side) for side in zip(*sizes, least))
        divisor = max(self.backbone.size_divisibility, 1)
        height, width = -(-height // divisor) * divisor, -(-width // divisor) * divisor
        images = self.pixel_mean.new_zeros((len(batch), len(self.pixel_mean), height, width))
        for padded, sample, (h, w) in zip(images, batch, sizes):
            image = sample["image"].to(self.device, non_blocking=True)
            view = torch.sub(image, self.pixel_mean, out=padded[:, :h, :w])
            if not self._unit_std:
                view /= self.pixel_std
        return images, sizes
