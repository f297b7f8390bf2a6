"""The same models and batches on the side of Detectron2. Imports Detectron2."""

from __future__ import annotations

import copy
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from golden.model_cases import Scene, configure
from torch import Tensor, nn


def build_detectron2(case: str, **changes: Any) -> nn.Module:
    """Detectron2's model of a case, on the CPU, fresh weights."""
    return build_model(configure(get_cfg(), case, **changes))


def to_detectron2(scene: Scene) -> dict[str, Any]:
    """The scene as Detectron2's input dict."""
    instances = Instances(scene.size)
    instances.gt_boxes = Boxes(torch.from_numpy(scene.boxes))
    instances.gt_classes = torch.from_numpy(scene.classes).long()
    if scene.masks and not isinstance(scene.masks[0], list):
        instances.gt_masks = BitMasks(torch.stack([torch.from_numpy(m) for m in scene.masks]))
    else:
        instances.gt_masks = PolygonMasks(copy.deepcopy(scene.masks))
    return {
        "image": torch.from_numpy(scene.image),
        "height": scene.output[0],
        "width": scene.output[1],
        "instances": instances,
    }


def detectron2_losses(model: nn.Module, scenes: list[Scene], seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Losses of one training forward, and the scalars it logged."""
    model.train()
    torch.manual_seed(seed)
    with EventStorage() as storage:
        losses = model([to_detectron2(s) for s in scenes])
        return losses, {name: value for name, (value, _) in storage.latest().items()}


@torch.no_grad()
def detectron2_detections(model: nn.Module, scenes: list[Scene]) -> tuple[list[Instances], list[Instances]]:
    """Proposals, and post-processed detections."""
    model.eval()
    inputs = [to_detectron2(s) for s in scenes]
    images = model.preprocess_image(inputs)
    proposals, _ = model.proposal_generator(images, model.backbone(images.tensor), None)
    return proposals, [out["instances"] for out in model(inputs)]
