"""The same models and batches on the side of Detectron2. Imports Detectron2."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from gn_det.detectron2 import add_gn_config
from gn_det.structures import rasterize_polygons
from tests.golden.model_cases import Scene, configure


def build_detectron2(case: str, **changes: Any) -> nn.Module:
    """Detectron2's model of a case, on the CPU, fresh weights."""
    return build_model(configure(get_cfg(), case, **changes))


def registered_cfg() -> Any:
    """Detectron2's config with the plugin's keys, on the CPU."""
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def registered_names(cfg: Any) -> Any:
    """Write out the names of gn_det's modules: they are built whatever the norm. Changes and returns ``cfg``."""
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("build_resnet", "build_gn_resnet")
    cfg.MODEL.ROI_MASK_HEAD.NAME = "GNMaskRCNNConvUpsampleHead"
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
        cfg.MODEL.ROI_HEADS.NAME = "GNRes5ROIHeads"
    else:
        cfg.MODEL.ROI_BOX_HEAD.NAME = "GNFastRCNNConvFCHead"
    return cfg


def build_registered(case: str, **changes: Any) -> nn.Module:
    """Detectron2's model of a case on the modules that gn_det registers, on the CPU, fresh weights."""
    return build_model(registered_names(configure(registered_cfg(), case, **changes)))


#: The two models inside Detectron2 that the embedded engine is compared with.
SIDES = {"own": build_detectron2, "registered": build_registered}


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


def sample_to_detectron2(sample: Any) -> dict[str, Any]:
    """A training sample of gn_det's loader as Detectron2's input dict; masks as bitmaps, polygons rasterized."""
    targets = sample["targets"]
    height, width = targets.image_size
    instances = Instances(targets.image_size)
    instances.gt_boxes, instances.gt_classes = Boxes(targets.boxes.clone()), targets.classes.clone()
    bitmaps = [rasterize_polygons(m, height, width) if isinstance(m, list) else m for m in targets.masks.masks]
    stacked = np.stack(bitmaps) if bitmaps else np.zeros((0, height, width), dtype=bool)
    instances.gt_masks = BitMasks(torch.from_numpy(np.ascontiguousarray(stacked)).bool())
    kept = {key: sample[key] for key in ("image", "height", "width", "image_id")}
    return {**kept, "instances": instances}


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
