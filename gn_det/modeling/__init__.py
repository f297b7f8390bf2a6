"""The embedded engine's Mask R-CNN on torch and torchvision.ops, equal to Detectron2's number for number."""

from __future__ import annotations

from gn_det.modeling.build import build_model
from gn_det.modeling.mask_rcnn import MaskRCNN

__all__ = ["MaskRCNN", "build_model"]
