"""Configs and models of the plugin for its tests. Imports Detectron2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

import gn_det
from gn_det.data.shapes import make_shapes
from gn_det.detectron2 import add_gn_config
from tests.golden.model_cases import configure


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


#: Overrides that make quickstart.yaml train in a fraction of a second an iteration.
TINY = [
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.PRE_NMS_TOPK_TEST", "30", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TRAIN", "96"),
    *("INPUT.MAX_SIZE_TEST", "96", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.DEVICE", "cpu", "SEED", "3"),
]


def own_data(root: Path) -> list[str]:
    """Flags for 8 + 4 generated images: --train-json, its file, --train-images, its folder; then the same of val."""
    sources = make_shapes(root, "train", 8), make_shapes(root, "val", 4)
    pairs = zip(("train", "val"), sources)
    return [w for s, d in pairs for w in (f"--{s}-json", d.json_file, f"--{s}-images", d.image_root)]


def tiny(data: list[str], output: Path, *more: str, engine: str = "detectron2") -> list[str]:
    """Words of a ``gn-det train`` on a tiny model."""
    words = ["train", "--engine", engine, "--config", "quickstart.yaml", *data, "--output", str(output)]
    return [*words, *TINY, *more]


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.json of a run."""
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def state(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint."""
    return torch.load(path, weights_only=True)["model"]
