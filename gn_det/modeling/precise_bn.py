"""Precise BN: running statistics recomputed with fixed weights (Wu and Johnson 2021, "Rethinking Batch")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Population:
    """Mean and variance of all values that a layer saw, whatever the sizes of its batches."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.momentum = layer, layer.momentum
        self.mean, self.square = torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var)
        self.total = 0

    def __call__(self, layer: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        """After a forward pass of the layer, whose momentum is 1: its running statistics are those of the batch."""
        size = args[0].numel() // args[0].shape[1]
        if not size:
            return
        self.total += size
        square = layer.running_mean.square() + layer.running_var * ((size - 1) / size)  # without Bessel's correction
        self.mean += (layer.running_mean - self.mean) * (size / self.total)
        self.square += (square - self.square) * (size / self.total)

    def put(self) -> None:
        self.layer.momentum = self.momentum
        if self.total:
            self.layer.running_mean.copy_(self.mean)
            self.layer.running_var.copy_(self.square - self.mean.square())


@torch.no_grad()
def precise_bn(model: nn.Module, forward: Callable[[Any], object], batches: Iterable[Any]) -> int:
    """Set the running statistics of every BN layer in training mode to those of all values in ``batches``.

    Equal to fvcore's ``update_bn_stats``, which Detectron2's hook calls. Unlike it, layers may be called several times
    or on no values (a head without RoIs), and hooks and momentum are restored after an error. Modes and weights stay as
    they are.

    Args:
        model: holds the layers.
        forward: runs the model, or what contains it, on one batch.

    Returns:
        The number of layers; 0 where nothing was to be done and no batch was read.
    """
    layers = [_Population(m) for m in model.modules() if m.training and isinstance(m, _BATCH_NORMS)]
    if not layers:
        return 0
    with ExitStack() as stack:
        for population in layers:
            population.layer.momentum = 1.0
            stack.callback(population.put)
            stack.callback(population.layer.register_forward_hook(population).remove)
        for batch in batches:
            forward(batch)
    return len(layers)
