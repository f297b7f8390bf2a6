"""RoIAlign and RoIPool over a feature pyramid.

Shape letters: P boxes of all images, C channels, S side of the pooled grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

from gn_det.errors import ConfigError
from gn_det.kernels import native, takes_native_roi_align
from gn_det.kernels.reference import memory_format
from gn_det.modeling import boxes as box_ops


class _Gather(torch.autograd.Function):
    """Rows of ``parts`` at the places ``rows`` of one tensor in their layout; the backward takes them from there."""

    @staticmethod
    def forward(ctx: Any, rows: Sequence[Tensor], *parts: Tensor) -> Tensor:
        ctx.rows = rows
        count = sum(len(part) for part in parts)
        y = torch.empty(
            (count, *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device,
            memory_format=memory_format(parts[0]),
        )  # fmt: skip
        for at, part in zip(rows, parts):
            _rows_first(y).index_copy_(0, at, _rows_first(part))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        last = memory_format(grads[0]) is torch.channels_last
        taken = (_rows_first(grads[0]).index_select(0, at) for at in ctx.rows)
        return (None, *(t.permute(0, 3, 1, 2) if last else t for t in taken))


def _rows_first(x: Tensor) -> Tensor:
    """``x`` in the order of memory: index_select does not keep channels_last."""
    return x.permute(0, 2, 3, 1) if memory_format(x) is torch.channels_last else x


class RoIPooler(nn.Module):
    """Cuts (S, S) features of boxes from the level that fits their size: floor(4 + log2(sqrt(area) / 224)).

    Args:
        output_size: S.
        strides: of the levels, fine to coarse, doubling powers of two.
        sampling_ratio: samples per bin and direction; 0 takes as many as the bin has cells.
        kind: "ROIAlignV2"; "ROIAlign", which does not shift by half a pixel; "ROIPool", the maximum of the cells.
        fused: "off" always takes torchvision's RoIAlign; else channels_last maps on a CPU take gn_det's where it is
            built, which is equal but for rounding.
    """

    def __init__(
        self,
        output_size: int,
        *,
        strides: Sequence[int],
        sampling_ratio: int = 0,
        kind: str = "ROIAlignV2",
        fused: str = "auto",
    ) -> None:
        super().__init__()
        levels = [math.log2(s) for s in strides]
        if any(not k.is_integer() for k in levels) or any(b != a + 1 for a, b in pairwise(levels)):
            raise ConfigError(f"MODEL.ROI_HEADS.IN_FEATURES: strides {list(strides)} are not doubling powers of two")
        self.output_size = output_size
        self.scales = [1.0 / s for s in strides]
        self.min_level, self.max_level = int(levels[0]), int(levels[-1])
        self.sampling_ratio = sampling_ratio
        self.kind = kind
        self.aligned = kind == "ROIAlignV2"
        self.fused = fused

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool the boxes of each image.

        Args:
            features: per level (B, C, H, W).
            boxes: per image (Pi, 4) float32; any may be empty.

        Returns:
            (P, C, S, S), boxes in the order of the images.
        """
        index = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        all_boxes = torch.cat(list(boxes))
        rois = torch.cat([index, all_boxes], dim=1)
        if len(features) == 1:
            return self.pool(features[0], rois, self.scales[0])
        levels = self.levels(all_boxes)
        counts = torch.bincount(levels, minlength=len(features)).tolist()
        used = [k for k, count in enumerate(counts) if count]
        if len(used) <= 1:
            k = used[0] if used else 0
            return self.pool(features[k], rois, self.scales[k])
        by_level = levels.argsort(stable=True)
        rows = torch.split(by_level, counts)
        pooled = [self.pool(features[k], rois[rows[k]], self.scales[k]) for k in used]
        ordered: Tensor = _Gather.apply([rows[k] for k in used], *pooled)
        return ordered

    def levels(self, boxes: Tensor) -> Tensor:
        size = torch.sqrt(box_ops.area(boxes))
        level = torch.floor(4 + torch.log2(size / 224 + 1e-8))
        return level.clamp(min=self.min_level, max=self.max_level).to(torch.int64) - self.min_level

    def pool(self, feature: Tensor, rois: Tensor, scale: float) -> Tensor:
        if self.kind == "ROIPool":  # not for bf16 on a CPU; a maximum loses nothing by the way back
            best: Tensor = roi_pool(feature.float(), rois, self.output_size, scale).to(feature.dtype)
            return best
        if takes_native_roi_align(feature, self.fused):
            return native.roi_align(feature, rois, self.output_size, scale, self.sampling_ratio, self.aligned)
        if feature.dtype != rois.dtype and not torch.is_autocast_enabled(feature.device.type):
            rois = rois.to(feature.dtype)  # under autocast roi_align computes in float32 by itself
        size = (self.output_size, self.output_size)
        pooled: Tensor = roi_align(feature, rois, size, scale, self.sampling_ratio, self.aligned)
        return pooled
