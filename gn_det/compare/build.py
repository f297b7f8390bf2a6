"""Models of rows without memory for them: to check that a row describes one, and to count its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.engine.interface import Engine


def build_empty(engine: Engine, cfg: CfgNode) -> nn.Module:
    """The configured model on torch's meta device, where the engine can do that; 80 classes where none are named.

    Raises:
        UserError: the config describes no model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES or 80
    if engine.name != "embedded":
        return engine.build_model(cfg)
    with torch.device("meta"):
        return engine.build_model(cfg)


def build_classifier(settings: Mapping[str, Any]) -> nn.Module:
    """The network of a pre-training row.

    Raises:
        ConfigError: the settings describe no network (groups that do not divide the channels ...).
    """
    from gn_det.classification import Settings
    from gn_det.classification.network import build_classifier as build

    with torch.device("meta"):
        return build(Settings.from_dict(settings), num_classes=10)
