"""Let Detectron2's module names build gn_det's modules for configs with gn_det's keys.

A config names its modules (``build_resnet_fpn_backbone``, ``FastRCNNConvFCHead`` ...), and the same YAML must run on
both engines. Detectron2's modules would silently ignore MODEL.GN (their GN always has 32 groups) and give "LN" another
meaning. So the registry entries of these names check the config first. An entry that is a class remains one, so that it
can be subclassed. A config without MODEL.GN, which only ``add_gn_config`` adds, still gets Detectron2's own module, so
nothing else in the process changes. So does one whose norms are not GN, LN or IN, except for an FPN without res5, which
Detectron2 cannot build because it makes the extra level from p5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry

from gn_det.config.kinds import THEIR_NORMS
from gn_det.detectron2 import backbone
from gn_det.detectron2 import gn_heads as heads
from gn_det.detectron2.config import GROUP_NORMS, has_gn_keys, mention_other_groups, prepare_config, warn_of_norms
from gn_det.modeling.build import group_rule, is_pre_activation, weight_standardization
from gn_det.norm import GroupRule

_FPN = ("RESNETS", "FPN")
#: registry, Detectron2's name, gn_det's builder, sections whose NORM decides
ROUTES: tuple[tuple[Registry, str, Callable[..., Any], tuple[str, ...]], ...] = (
    (BACKBONE_REGISTRY, "build_resnet_backbone", backbone.build_gn_resnet_backbone, ("RESNETS",)),
    (BACKBONE_REGISTRY, "build_resnet_fpn_backbone", backbone.build_gn_resnet_fpn_backbone, _FPN),
    (BACKBONE_REGISTRY, "build_retinanet_resnet_fpn_backbone", backbone.build_gn_retinanet_resnet_fpn_backbone, _FPN),
    (ROI_HEADS_REGISTRY, "Res5ROIHeads", heads.GNRes5ROIHeads, ("RESNETS",)),
    (ROI_BOX_HEAD_REGISTRY, "FastRCNNConvFCHead", heads.GNFastRCNNConvFCHead, ("ROI_BOX_HEAD",)),
    (ROI_MASK_HEAD_REGISTRY, "MaskRCNNConvUpsampleHead", heads.GNMaskRCNNConvUpsampleHead, ("ROI_MASK_HEAD",)),
)


def route_names() -> None:
    """Install the routes; a second call does nothing."""
    for registry, name, build, sections in ROUTES:
        # fvcore's Registry refuses to register a name twice and has no public way to replace one.
        registry._obj_map[name] = _routed(registry.get(name), functools.partial(_choose, build, sections))
    if not isinstance(META_ARCH_REGISTRY._obj_map, _Architectures):
        META_ARCH_REGISTRY._obj_map = _Architectures(META_ARCH_REGISTRY._obj_map)


class _Architectures(dict[str, Any]):
    """Routed entries of the model registry: Detectron2's, and those that users register later."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__({name: _routed(entry, _prepare) for name, entry in entries.items()})

    def __setitem__(self, name: str, entry: Any) -> None:
        super().__setitem__(name, _routed(entry, _prepare))


def _routed(stock: Any, wrapper: Callable[..., Any]) -> Any:
    """Return ``stock`` with calls redirected to ``wrapper``; unchanged if already routed."""
    if "gn_det_stock" in getattr(stock, "__dict__", ()):
        return stock
    if isinstance(stock, type):
        return _routed_class(stock, wrapper)

    @functools.wraps(stock)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return wrapper(stock, *args, **kwargs)

    routed.gn_det_stock = stock  # type: ignore[attr-defined]
    return routed


def _routed_class(stock: type, wrapper: Callable[..., Any]) -> type:
    """Return a subclass whose calls go to ``wrapper``; classes derived from it behave as if derived from ``stock``."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        # The result is not an instance of ``routed``, so Python does not call __init__.
        return wrapper(stock, *args, **kwargs) if cls is routed else object.__new__(cls)

    names = ("__module__", "__qualname__", "__doc__")
    body = {"__new__": new, "gn_det_stock": stock} | {name: getattr(stock, name) for name in names}
    routed = type(stock)(stock.__name__, (stock,), body)
    return routed


def _prepare(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Build a model: fill in open config values first, then warn about norms that do not follow MODEL.GN."""
    cfg = _config_in(args, kwargs)
    if cfg is None:
        return stock(*args, **kwargs)
    prepare_config(cfg)
    mention_other_groups(cfg)
    model = stock(*args, **kwargs)
    warn_of_norms(cfg, model)
    return model


def _choose(
    ours: Callable[..., Any], sections: tuple[str, ...], stock: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    build, cfg = stock, _config_in(args, kwargs)
    if cfg is not None:
        prepare_config(cfg)
        build = ours if _is_ours(cfg, sections) else stock
    return build(*args, **kwargs)


def _config_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the config with gn_det's keys that a module is built from; None for other configs or keyword arguments."""
    cfg = kwargs.get("cfg", args[0] if args else None)
    return cfg if isinstance(cfg, CfgNode) and has_gn_keys(cfg) else None


def _is_ours(cfg: Any, sections: tuple[str, ...]) -> bool:
    """Return whether gn_det's module is needed (for a norm of these sections, or an FPN without res5) and possible."""
    norms = {cfg.MODEL[section].NORM for section in sections}
    without_res5 = "FPN" in sections and "res5" not in cfg.MODEL.FPN.IN_FEATURES
    other_convolutions = any(weight_standardization(cfg, section) for section in sections)
    if without_res5 or other_convolutions or ("RESNETS" in sections and is_pre_activation(cfg)):
        return True
    if not norms & set(GROUP_NORMS):
        return False
    deformable = "RESNETS" in sections and any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
    only_theirs = deformable or norms & set(THEIR_NORMS)
    same_there = group_rule(cfg) == GroupRule() and not norms & {"LN", "IN"}
    # If neither can build it, gn_det's module raises the error.
    return not (only_theirs and same_there)
