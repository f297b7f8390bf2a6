"""Test-time augmentation (TEST.AUG): detect in several sizes of an image, also mirrored, and merge the results.

Equal to Detectron2's GeneralizedRCNNWithTTA, including batches of three images, because padding affects the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from gn_det.data.transforms import Flip, Resize, Transform, apply_to_image, resized_shape
from gn_det.modeling import boxes as box_ops
from gn_det.modeling.mask_rcnn import MaskRCNN
from gn_det.modeling.postprocess import resize_detections
from gn_det.structures import Detections, Sample

_BATCH = 3


class _View:
    """One size of an image: its sample, and the transforms of boxes from and to the original image."""

    def __init__(self, pixels: np.ndarray, original: tuple[int, int], side: int, most: int, flip: bool) -> None:
        shape = pixels.shape[0], pixels.shape[1]
        resize = Resize(*shape, *resized_shape(*shape, side, most))
        mirror = [Flip(1, resize.new_width)] if flip else []
        self.flipped = flip
        self.there: list[Transform] = [Resize(*original, *shape), resize, *mirror]
        self.back = [*mirror, Resize(resize.new_height, resize.new_width, *shape), Resize(*shape, *original)]
        pixels = apply_to_image([resize, *mirror], pixels)
        self.sample = Sample(image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))

    @staticmethod
    def move(boxes: Tensor, transforms: Sequence[Transform]) -> Tensor:
        """Apply ``transforms`` to (N, 4) XYXY boxes."""
        points = boxes.cpu().numpy().reshape(-1, 2).copy()
        for transform in transforms:
            points = transform.coords(points)
        corners = points.reshape(-1, 2, 2)
        moved = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        return torch.from_numpy(moved).to(boxes.device)


class Augmented:
    """Detector with TEST.AUG: a function from samples to detections at original size."""

    def __init__(self, model: Any, cfg: Any) -> None:
        self.model: MaskRCNN = model
        self.sizes, self.most, self.flip = cfg.TEST.AUG.MIN_SIZES, int(cfg.TEST.AUG.MAX_SIZE), bool(cfg.TEST.AUG.FLIP)
        self.nms, self.keep = float(cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST), int(cfg.TEST.DETECTIONS_PER_IMAGE)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Detections]:
        """Return the detections of each sample."""
        return [self._detect(sample) for sample in samples]

    def _detect(self, sample: Sample) -> Detections:
        pixels = sample["image"].cpu().permute(1, 2, 0).numpy()
        original = (sample["height"], sample["width"])
        flips = (False, True) if self.flip else (False,)
        views = [_View(pixels, original, int(side), self.most, flip) for side in self.sizes for flip in flips]
        heads, found = self.model.roi_heads, list[Detections]()
        for features, sizes in self._features(views):
            proposals, _ = self.model.proposal_generator(features, sizes)
            found += heads.detect_boxes([features[name] for name in heads.in_features], proposals)
        scores, classes = (torch.cat([getattr(d, part) for d in found]) for part in ("scores", "classes"))
        boxes = torch.cat([view.move(d.boxes, view.back) for view, d in zip(views, found)])
        boxes = box_ops.clip(boxes, original)
        keep = batched_nms(boxes, scores, classes, self.nms)[: self.keep]
        merged = Detections(original, boxes[keep], scores[keep], classes[keep])
        if heads.mask_head is None:
            return merged
        merged.masks = self._masks(views, merged)
        return resize_detections(merged, *original)

    def _features(self, views: Sequence[_View]) -> Iterator[tuple[dict[str, Tensor], list[tuple[int, int]]]]:
        for start in range(0, len(views), _BATCH):
            images, sizes = self.model.preprocess([view.sample for view in views[start : start + _BATCH]])
            yield self.model.backbone(images), sizes

    def _masks(self, views: Sequence[_View], merged: Detections) -> Tensor:
        """Return the mask probabilities within the merged boxes, averaged over the views."""
        total: list[Tensor] = []
        heads = self.model.roi_heads
        for number, (features, sizes) in enumerate(self._features(views)):
            part = views[number * _BATCH : (number + 1) * _BATCH]
            given = [
                Detections(size, view.move(merged.boxes, view.there), merged.scores, merged.classes)
                for view, size in zip(part, sizes)
            ]
            heads.add_masks([features[name] for name in heads.in_features], given)
            for view, detections in zip(part, given):
                assert detections.masks is not None
                total.append(detections.masks.flip(dims=[-1]) if view.flipped else detections.masks)
        return torch.stack(total).mean(dim=0)
