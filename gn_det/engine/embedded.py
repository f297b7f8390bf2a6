"""The embedded engine: gn_det's own model on plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gn_det.engine import commands
from gn_det.engine.loop import Hook
from gn_det.engine.optim import build_optimizer
from gn_det.engine.schedule import build_lr_scheduler
from gn_det.structures import Detections, Sample


@dataclass(frozen=True)
class EmbeddedEngine:
    """See :class:`gn_det.engine.interface.Engine`."""

    why: str = ""
    name: str = "embedded"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def build_model(self, cfg: CfgNode) -> nn.Module:
        from gn_det.modeling.build import build_model

        return build_model(cfg)

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    def build_scheduler(self, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    def detector(self, model: nn.Module) -> Callable[[list[Sample]], list[Detections]]:
        return model

    def inputs(self, batches: Iterable[list[Sample]]) -> Iterable[Any]:
        return batches

    def hooks(self) -> list[Hook]:
        return []


def train(cfg: CfgNode, **kwargs: Any) -> dict[str, float]:
    """:func:`gn_det.engine.commands.train` on this engine."""
    return commands.train(EmbeddedEngine(), cfg, **kwargs)


def evaluate(cfg: CfgNode, **kwargs: Any) -> dict[str, float]:
    """:func:`gn_det.engine.commands.evaluate` on this engine."""
    return commands.evaluate(EmbeddedEngine(), cfg, **kwargs)


def dry_run(cfg: CfgNode, **kwargs: Any) -> None:
    """:func:`gn_det.engine.commands.dry_run` on this engine."""
    commands.dry_run(EmbeddedEngine(), cfg, **kwargs)
