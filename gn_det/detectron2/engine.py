"""The Detectron2 engine: Detectron2's model, optimizer and schedule in gn_det's run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import detectron2
import detectron2.modeling
import detectron2.solver
from detectron2.config import CfgNode, get_cfg

import gn_det.detectron2  # noqa: F401  # a process that unpickles the engine needs everything registered
from gn_det.config.defaults import flatten, set_value
from gn_det.detectron2.adapt import adapt
from gn_det.detectron2.config import OWN_CLASSES, add_gn_config, check_device, trainer_keys_are_read
from gn_det.detectron2.conversion import detector, to_inputs
from gn_det.detectron2.steps import Storage, build_optimizer
from gn_det.engine.choice import Choice, load
from gn_det.engine.engines import Engine
from gn_det.structures import Detections, Sample

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode as AnyCfgNode
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from gn_det.engine.loop import Hook


@dataclass(frozen=True)
class Detectron2Engine(Engine):
    """See :class:`gn_det.engine.engines.Engine`."""

    name: ClassVar[str] = "detectron2"
    autocast_cache: ClassVar[bool] = True

    def __reduce__(self) -> Any:
        # so that another process also imports Detectron2 quietly
        return (load, (Choice(self.name, self.why),))

    def version(self) -> str:
        return f"Detectron2 {detectron2.__version__}"

    def build_model(self, cfg: AnyCfgNode) -> nn.Module:
        with trainer_keys_are_read():
            model: nn.Module = detectron2.modeling.build_model(model_config(cfg))
        adapt(model, cfg)
        return model

    def build_optimizer(self, cfg: AnyCfgNode, model: nn.Module) -> Optimizer:
        check_device(cfg, next(model.parameters()).device.type)
        return build_optimizer(to_detectron2(cfg), model, clips=False)

    def build_scheduler(self, cfg: AnyCfgNode, optimizer: Optimizer) -> LRScheduler:
        scheduler: LRScheduler = detectron2.solver.build_lr_scheduler(to_detectron2(cfg), optimizer)
        return scheduler

    def detector(self, model: nn.Module, cfg: AnyCfgNode) -> Callable[[list[Sample]], list[Detections]]:
        return detector(model, cfg)

    def inputs(self, batches: Iterable[list[Sample]]) -> Iterable[Any]:
        return map(to_inputs, batches)

    def hooks(self) -> list[Hook]:
        return [Storage()]


def to_detectron2(cfg: AnyCfgNode) -> CfgNode:
    """Copy a gn_det config to Detectron2's class, with the same keys and values, not frozen."""
    out = get_cfg()
    add_gn_config(out)
    for name, value in flatten(cfg.clone()):
        set_value(out, name, value)
    return out


def model_config(cfg: AnyCfgNode) -> CfgNode:
    """Return ``cfg`` for building a model with Detectron2: on the CPU, with given classes and no dataset."""
    out = to_detectron2(cfg)
    out.MODEL.DEVICE = "cpu"
    data = out.DATASETS
    data.TRAIN, data.TEST = (), ()
    data.TRAIN_JSON = data.TRAIN_IMAGES = data.VAL_JSON = data.VAL_IMAGES = ""
    for section in OWN_CLASSES.values():
        if section in out.MODEL and cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            out.MODEL[section].NUM_CLASSES = int(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return out
