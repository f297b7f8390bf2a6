"""gn_det's samples as Detectron2's inputs, and its instances as gn_det's detections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from gn_det.structures import Detections, InstanceMask, Masks, Sample, Targets


class MixedMasks(Masks):
    """Masks of one image as Detectron2's heads take them; unlike theirs, polygons and bitmaps may be mixed.

    They stay in host memory; mask targets come on the device of the boxes.
    """

    def __getitem__(self, index: int | Tensor | np.ndarray | slice | Sequence[int]) -> MixedMasks:
        if isinstance(index, (int, np.integer)) or (isinstance(index, Tensor) and index.dim() == 0):
            index = [int(index)]
        return MixedMasks(super().__getitem__(index).masks)

    def __iter__(self) -> Iterator[InstanceMask]:
        return iter(self.masks)

    def to(self, *args: Any, **kwargs: Any) -> MixedMasks:
        """Itself."""
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def nonempty(self) -> Tensor:
        """(N,) bool: has polygons, or a pixel."""
        found = [len(m) > 0 if isinstance(m, list) else bool(m.any()) for m in self.masks]
        return torch.tensor(found, dtype=torch.bool)

    @staticmethod
    def cat(parts: Sequence[MixedMasks]) -> MixedMasks:
        """All masks of several images' objects in one."""
        return MixedMasks([mask for part in parts for mask in part.masks])


def to_instances(targets: Targets) -> Instances:
    """Ground truth under Detectron2's names: ``gt_boxes``, ``gt_classes`` and, where there are masks, ``gt_masks``."""
    instances = Instances(targets.image_size)
    instances.gt_boxes = Boxes(targets.boxes)
    instances.gt_classes = targets.classes
    if targets.masks is not None:
        instances.gt_masks = MixedMasks(targets.masks.masks)
    return instances


def to_inputs(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A batch as Detectron2's models take it: ``image``, ``height``, ``width`` ..., and ``instances`` for training."""
    inputs = []
    for sample in samples:
        one: dict[str, Any] = {k: v for k, v in sample.items() if k != "targets"}
        if "targets" in sample:
            one["instances"] = to_instances(sample["targets"])
        inputs.append(one)
    return inputs


class Inputs(Iterable[Any]):
    """Batches of samples as batches of inputs."""

    def __init__(self, batches: Iterable[list[Sample]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return map(to_inputs, self.batches)


def to_detections(instances: Instances) -> Detections:
    """What a model found in one image, at original size."""
    masks = instances.pred_masks if instances.has("pred_masks") else None
    boxes, scores, classes = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
    return Detections(tuple(instances.image_size), boxes, scores, classes, masks)


def detector(model: nn.Module, cfg: Any) -> Callable[[list[Sample]], list[Detections]]:
    """``model``, in evaluation mode, as a function from samples to detections; with TEST.AUG in several sizes."""
    if cfg.TEST.AUG.ENABLED:
        model = GeneralizedRCNNWithTTA(cfg, model)

    def detect(samples: list[Sample]) -> list[Detections]:
        inputs = to_inputs([Sample(**{k: v for k, v in s.items() if k != "targets"}) for s in samples])  # type: ignore[typeddict-item]
        return [to_detections(output["instances"]) for output in model(inputs)]

    return detect
