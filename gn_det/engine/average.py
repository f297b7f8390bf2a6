"""Moving average of the weights (EMA): kept beside the model that learns, evaluated and saved in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn


class WeightAverage:
    """``average = d * average + (1 - d) * weights`` after every step, over parameters and buffers.

    ``d`` is ``min(decay, (1 + n) / (10 + n))`` after n steps, TensorFlow's rule, so that the random start is soon
    forgotten. Tensors that hold whole numbers are copied. Equal on all ranks, as the weights are.

    Args:
        model: where the average starts; it stays on the same device.
        decay: at least 0 and below 1.

    Attributes:
        steps: how many steps are averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._kept: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """The optimizer has stepped."""
        self.steps += 1
        weight = 1.0 - min(self.decay, (1.0 + self.steps) / (10.0 + self.steps))
        averages, tensors = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self._average[name])
                tensors.append(tensor)
            else:
                self._average[name].copy_(tensor)
        torch._foreach_lerp_(averages, tensors, weight)  # leaves what never changes (frozen) as it is, to the last bit

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages as ``model.state_dict()``, in its order and with its metadata."""
        weights = model.state_dict()
        for name in weights:
            weights[name] = self._average[name]
        return weights

    @torch.no_grad()
    def put_in(self, model: nn.Module) -> None:
        """The model holds the averages until :meth:`put_back`."""
        current = model.state_dict()
        self._kept = {name: tensor.detach().clone() for name, tensor in current.items()}
        for name, tensor in current.items():
            tensor.copy_(self._average[name])

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """The weights that learn are in the model again; nothing where they are there already."""
        if self._kept is not None:
            for name, tensor in model.state_dict().items():
                tensor.copy_(self._kept[name])
            self._kept = None

    @torch.no_grad()
    def restore(self, payload: Mapping[str, Any]) -> bool:
        """Go on from the averages of a checked checkpoint; False where it has none."""
        block = payload.get("ema")
        if not block:
            return False
        self.steps = block["steps"]
        for name, average in self._average.items():
            average.copy_(payload["model"][name])
        return True


def weight_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """What ``SOLVER.EMA`` asks for; None where it is off."""
    return WeightAverage(model, float(cfg.SOLVER.EMA.DECAY)) if cfg.SOLVER.EMA.ENABLED else None
