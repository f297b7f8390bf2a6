"""Percentiles of a layer's output over training (the paper's Figure 6: conv5_3 of VGG-16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.engine.loop import Hook, Loop
from gn_det.errors import ConfigError
from gn_det.text import did_you_mean, shown, some

#: The percentiles of Figure 6.
PERCENTILES = (1, 20, 80, 99)
#: Points of a run, at most; steps from one to the next, at least; images and values looked at in a step. Together they
#: keep the cost well below 2 % of a step (``benchmarks/classifier.py``).
_POINTS, _LEAST_STEPS, _IMAGES, _VALUES = 200, 10, 8, 16_384


def layer_of(trunk: nn.Module, name: str) -> nn.Module:
    """Return a trunk's layer such as "conv5_3" or "res4.2.conv2"; ConfigError names some that exist."""
    layers = {n: m for n, m in trunk.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if name not in layers:
        hint = did_you_mean(name, layers) or f"; the layers are {some(layers, 8)}"
        raise ConfigError(f"classify record is {shown(name)}, but the network has no such layer{hint}")
    return layers[name]


def percentiles(values: Tensor) -> list[float]:
    """The :data:`PERCENTILES` of a sample of ``values`` (any shape and dtype), spread evenly over them."""
    flat = values.detach().flatten()
    flat = flat[:: -(-flat.numel() // _VALUES)].float()
    found: list[float] = torch.quantile(flat, flat.new_tensor(PERCENTILES) / 100).tolist()
    return found


class Recorder(Hook):
    """Adds ``{"epoch", "p1", "p20", "p80", "p99"}`` of a layer's output before norm and ReLU to ``rows``.

    Every few steps, from the first images of a training batch; what is trained stays the same to the bit. The epoch
    is a fraction: that of the training that was done.
    """

    def __init__(self, layer: nn.Module, rows: list[dict[str, float]], *, total: int, per_epoch: int) -> None:
        self.layer, self.rows, self.per_epoch = layer, rows, per_epoch
        self.every = max(_LEAST_STEPS, round(total / _POINTS))
        self._handle: Any = None
        self._found: list[float] = []

    def before_step(self, loop: Loop) -> None:
        if (loop.state.iteration + 1) % self.every == 0:
            self._handle = self.layer.register_forward_hook(self._look)

    def after_step(self, loop: Loop) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            named = {f"p{p}": value for p, value in zip(PERCENTILES, self._found)}
            self.rows.append({"epoch": (loop.state.iteration + 1) / self.per_epoch, **named})

    @torch.no_grad()
    def _look(self, layer: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):  # its output is that of norm and ReLU, so it is computed once more
            images = inputs[0][:_IMAGES]
            output = layer._conv_forward(images, layer.weight, layer.bias)
        self._found = percentiles(output)
