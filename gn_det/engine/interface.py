"""What the two engines have to offer, so that everything else of a run is the same for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from fvcore.common.config import CfgNode
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gn_det.engine.loop import Hook
from gn_det.structures import Detections, Sample


class Engine(Protocol):
    """One way to build and train the model of a config. Instances travel to other processes by pickle.

    Attributes:
        name: as ``--engine`` names it.
        why: why it was chosen, for the log; "" says nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...

    def version(self) -> str:
        """Of the library that trains, for the log."""
        ...

    def build_model(self, cfg: CfgNode) -> nn.Module:
        """The configured model with fresh weights, on the CPU; parameter names and their order are Detectron2's."""
        ...

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Its groups are those of :func:`gn_det.engine.optim.optimizer_groups`."""
        ...

    def build_scheduler(self, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Stepped once an iteration."""
        ...

    def detector(self, model: nn.Module) -> Callable[[list[Sample]], list[Detections]]:
        """``model``, in evaluation mode, as a function from samples to detections at original size."""
        ...

    def inputs(self, batches: Iterable[list[Sample]]) -> Iterable[Any]:
        """The micro-batches as the model takes them in training."""
        ...

    def hooks(self) -> list[Hook]:
        """What the model needs around the steps; they come first."""
        ...
