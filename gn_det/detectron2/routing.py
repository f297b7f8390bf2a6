"""Detectron2's own module names build gn_det's modules, for configs that have gn_det's keys.

A config names its modules (``build_resnet_fpn_backbone``, ``FastRCNNConvFCHead`` ...), and the same YAML must run on
both engines. Leaving the choice to Detectron2's modules would ignore MODEL.GN without a word (their GN always has 32
groups) and give "LN" another meaning. So the registry entries of these names become functions that look at the config
first. A config without MODEL.GN, which only ``add_gn_config`` adds, gets Detectron2's own module as ever, so nothing
else in the process is affected; so does one whose norms are not GN, LN or IN, except where Detectron2's FPN cannot run:
its extra level is made of p5, which a pyramid without res5 does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from fvcore.common.registry import Registry

from gn_det.detectron2 import backbone, heads
from gn_det.detectron2.config import GROUP_NORMS, has_gn_keys, prepare_config
from gn_det.modeling.build import group_rule
from gn_det.norm import NORM_NAMES, GroupRule

#: registry, Detectron2's name, what gn_det builds for it, the sections whose NORM decides
ROUTES: tuple[tuple[Registry, str, Callable[..., Any], tuple[str, ...]], ...] = (
    (BACKBONE_REGISTRY, "build_resnet_backbone", backbone.build_gn_resnet_backbone, ("RESNETS",)),
    (BACKBONE_REGISTRY, "build_resnet_fpn_backbone", backbone.build_gn_resnet_fpn_backbone, ("RESNETS", "FPN")),
    (
        BACKBONE_REGISTRY,
        "build_retinanet_resnet_fpn_backbone",
        backbone.build_gn_retinanet_resnet_fpn_backbone,
        ("RESNETS", "FPN"),
    ),
    (ROI_HEADS_REGISTRY, "Res5ROIHeads", heads.GNRes5ROIHeads, ("RESNETS",)),
    (ROI_BOX_HEAD_REGISTRY, "FastRCNNConvFCHead", heads.GNFastRCNNConvFCHead, ("ROI_BOX_HEAD",)),
    (ROI_MASK_HEAD_REGISTRY, "MaskRCNNConvUpsampleHead", heads.GNMaskRCNNConvUpsampleHead, ("ROI_MASK_HEAD",)),
)


def route_names() -> None:
    """Install the routes; a second call does nothing."""
    for registry, name, build, sections in ROUTES:
        _replace(registry, name, functools.partial(_choose, build, sections))
    for name, _ in list(META_ARCH_REGISTRY):
        _replace(META_ARCH_REGISTRY, name, _prepare)


def _replace(registry: Registry, name: str, wrapper: Callable[..., Any]) -> None:
    stock = registry.get(name)
    if hasattr(stock, "gn_det_stock"):
        return

    @functools.wraps(stock, updated=())
    def routed(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(stock, cfg, *args, **kwargs)

    routed.gn_det_stock = stock  # type: ignore[attr-defined]
    # fvcore's Registry refuses to register a name twice and has no public way to replace one.
    registry._obj_map[name] = routed


def _prepare(stock: Callable[..., Any], cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """A whole model: first settle what the config leaves open."""
    prepare_config(cfg)
    return stock(cfg, *args, **kwargs)


def _choose(
    ours: Callable[..., Any],
    sections: tuple[str, ...],
    stock: Callable[..., Any],
    cfg: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not has_gn_keys(cfg):
        return stock(cfg, *args, **kwargs)
    prepare_config(cfg)
    build = ours if _is_ours(cfg, sections) else stock
    return build(cfg, *args, **kwargs)


def _is_ours(cfg: Any, sections: tuple[str, ...]) -> bool:
    """Whether a norm of these sections, or a pyramid without res5, takes gn_det's module, and that can be had."""
    norms = [cfg.MODEL[section].NORM for section in sections]
    if "FPN" in sections and "res5" not in cfg.MODEL.FPN.IN_FEATURES:
        return True
    if not any(norm in GROUP_NORMS for norm in norms):
        return False
    only_theirs = any(norm not in NORM_NAMES for norm in norms)  # nnSyncBN, naiveSyncBN ...
    if "RESNETS" in sections:
        only_theirs = only_theirs or any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
    same_there = group_rule(cfg) == GroupRule() and not {"LN", "IN"} & set(norms)
    # What neither can build, gn_det's module refuses by name.
    return not (only_theirs and same_there)
