"""Interface of a training engine, and the embedded engine, which implements it with gn_det's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gn_det.engine.loop import Hook
from gn_det.engine.optimizer import build_optimizer
from gn_det.engine.schedule import build_lr_scheduler
from gn_det.structures import Detections, Sample


@dataclass(frozen=True)
class Engine:
    """Builds, optimizes and feeds the model of a config; the rest of a run is the same for all engines.

    This class is the embedded engine; others override its methods. Instances are pickled to other processes.

    Attributes:
        why: reason for the choice, for the log.
    """

    why: str = ""
    name: ClassVar[str] = "embedded"
    autocast_cache: ClassVar[bool] = False

    def version(self) -> str:
        """Return name and version of the model's library, for the log."""
        return f"torch {torch.__version__}"

    def build_model(self, cfg: CfgNode) -> nn.Module:
        """Build the model on the CPU, with fresh weights and Detectron2's parameter names in Detectron2's order."""
        from gn_det.modeling.build import build_model

        return build_model(cfg)

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build an optimizer that does not clip gradients."""
        return build_optimizer(cfg, model)

    def build_scheduler(self, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Build the schedule, which is stepped once per iteration."""
        return build_lr_scheduler(cfg, optimizer)

    def detector(self, model: nn.Module, cfg: CfgNode) -> Callable[[list[Sample]], list[Detections]]:
        """Return ``model``, in evaluation mode, as a function from samples to detections at original size."""
        if cfg.TEST.AUG.ENABLED:
            from gn_det.engine.tta import Augmented

            return Augmented(model, cfg)
        return model

    def inputs(self, batches: Iterable[list[Sample]]) -> Iterable[Any]:
        """Convert micro-batches to the model's training input."""
        return batches

    def hooks(self) -> list[Hook]:
        """Return hooks that the model needs; they run first."""
        return []

    def __str__(self) -> str:
        return f"Engine: {self.name} ({self.version()}){f', {self.why}' if self.why else ''}."
