"""Configs and models of the plugin for its tests. Imports Detectron2."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from golden.model_cases import configure
from torch import nn

import gn_det
from gn_det.detectron2 import add_gn_config


def plugin_cfg(config: str = "", *pairs: Any) -> CfgNode:
    """Detectron2's config with the plugin's keys, a shipped config and further key-value pairs; on the CPU."""
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    if config:
        cfg.merge_from_file(gn_det.config_file(config))
    cfg.merge_from_list(list(pairs))
    return cfg


def without_plugin(cfg: CfgNode) -> CfgNode:
    """The same config without MODEL.GN: Detectron2 builds its own modules, with 32 groups."""
    cfg = cfg.clone()
    del cfg.MODEL["GN"]
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    return cfg


def build_plugin(case: str, **changes: Any) -> nn.Module:
    """The plugin's model of a golden case, on the CPU, fresh weights."""
    return build_model(configure(plugin_cfg(), case, **changes))


def gn_modules(model: nn.Module) -> set[str]:
    """Names of the classes in ``model`` that the plugin registered."""
    return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("gn_det.detectron2")}
