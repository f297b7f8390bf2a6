"""gn_det as a Detectron2 plugin: GN, LN and IN in Detectron2's models, by config or keyword arguments.

Importing this module only registers modules and datasets::

    import gn_det.detectron2

    cfg = get_cfg()
    gn_det.detectron2.add_gn_config(cfg)
    cfg.merge_from_file(gn_det.config_file("gn_fpn_long.yaml"))

As always in Detectron2, values in ``cfg`` are used literally; :func:`scale_to_machine` scales a schedule written for 8
GPUs to this machine. ``python -m gn_det.detectron2 TOOL ...`` runs one of Detectron2's scripts, or a similar one, with
gn_det's keys and names.

It registers backbones, heads (names below) and the generated datasets ``shapes_train`` and ``shapes_val``. YAML files
keep Detectron2's module names. After :func:`add_gn_config`, they build gn_det's modules wherever a norm is GN, LN or
IN, so that ``MODEL.GN`` is never silently ignored (see :mod:`gn_det.detectron2.routing` for how and why). The
registered names can also be used directly, with any norm:

============================================  =================================
gn_det                                        replaces
============================================  =================================
``build_gn_resnet_backbone``                  ``build_resnet_backbone``
``build_gn_resnet_fpn_backbone``              ``build_resnet_fpn_backbone``
``build_gn_retinanet_resnet_fpn_backbone``    ``build_retinanet_resnet_fpn_backbone``
``GNFastRCNNConvFCHead``                      ``FastRCNNConvFCHead``
``GNMaskRCNNConvUpsampleHead``                ``MaskRCNNConvUpsampleHead``
``GNRes5ROIHeads``                            ``Res5ROIHeads``
============================================  =================================

All classes take explicit keyword arguments, for LazyConfig. Parameter names are Detectron2's: its checkpoints load
strictly, and gn_det's load into its models.
"""

from __future__ import annotations

from gn_det.detectron2.backbone import (
    GNFPN,
    GNResNet,
    build_gn_resnet_backbone,
    build_gn_resnet_fpn_backbone,
    build_gn_retinanet_resnet_fpn_backbone,
)
from gn_det.detectron2.config import add_gn_config, prepare_config, scale_to_machine
from gn_det.detectron2.datasets import register_shapes
from gn_det.detectron2.gn_heads import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead, GNRes5ROIHeads, use_gn_heads
from gn_det.detectron2.routing import route_names
from gn_det.detectron2.trainer import Trainer

__all__ = [
    "GNFPN",
    "GNFastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNRes5ROIHeads",
    "GNResNet",
    "Trainer",
    "add_gn_config",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
    "prepare_config",
    "scale_to_machine",
    "use_gn_heads",
]

register_shapes()
route_names()
