"""Convert gn_det's samples to Detectron2's inputs, and its instances to gn_det's detections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from gn_det.structures import Detections, InstanceMask, Masks, Sample, Targets, to_numpy


class MixedMasks(Masks):
    """Masks of one image for Detectron2's heads; unlike Detectron2's own, they may mix polygons and bitmaps.

    They stay in host memory; mask targets are on the device of the boxes.
    """

    def __getitem__(self, index: int | Tensor | np.ndarray | slice | Sequence[int]) -> MixedMasks:
        chosen = index if isinstance(index, slice) else np.atleast_1d(to_numpy(index))
        return MixedMasks(super().__getitem__(chosen).masks)

    def __iter__(self) -> Iterator[InstanceMask]:
        return iter(self.masks)

    def to(self, *args: Any, **kwargs: Any) -> MixedMasks:
        """Return itself."""
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def cat(parts: Sequence[MixedMasks]) -> MixedMasks:
        """Concatenate the masks of several images."""
        return MixedMasks([mask for part in parts for mask in part.masks])


def to_instances(targets: Targets) -> Instances:
    """Return ground truth with Detectron2's names: ``gt_boxes``, ``gt_classes`` and, with masks, ``gt_masks``."""
    instances = Instances(targets.image_size)
    instances.gt_boxes = Boxes(targets.boxes)
    instances.gt_classes = targets.classes
    if targets.masks is not None:
        instances.gt_masks = MixedMasks(targets.masks.masks)
    return instances


def to_inputs(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Convert a batch to Detectron2's inputs: ``image``, ``height``, ``width`` ..., and ``instances`` for training."""
    inputs = []
    for sample in samples:
        one: dict[str, Any] = {k: v for k, v in sample.items() if k != "targets"}
        if "targets" in sample:
            one["instances"] = to_instances(sample["targets"])
        inputs.append(one)
    return inputs


def to_detections(instances: Instances) -> Detections:
    """Return the detections of one image at original size."""
    masks = instances.pred_masks if instances.has("pred_masks") else None
    boxes, scores, classes = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
    return Detections(tuple(instances.image_size), boxes, scores, classes, masks)


def detector(model: nn.Module, cfg: Any) -> Callable[[list[Sample]], list[Detections]]:
    """Return ``model``, in evaluation mode, as a function from samples to detections; TEST.AUG uses several sizes."""
    if cfg.TEST.AUG.ENABLED:
        model = GeneralizedRCNNWithTTA(cfg, model)

    def detect(samples: list[Sample]) -> list[Detections]:
        inputs = [{k: v for k, v in sample.items() if k != "targets"} for sample in samples]
        return [to_detections(output["instances"]) for output in model(inputs)]

    return detect
