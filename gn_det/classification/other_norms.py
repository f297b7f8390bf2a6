"""Norms of the paper's comparison that detectors do not have: Batch Renormalization and Weight Normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from gn_det.classification.settings import Settings, renorm_limits
from gn_det.engine.loop import Hook, Loop


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch Renormalization (Ioffe 2017): in training, ``y = (x - mean) / std * r + d``, then gamma and beta.

    Mean and std are the batch's; ``r = std / running_std`` within [1 / r_max, r_max] and
    ``d = (mean - running_mean) / running_std`` within [-d_max, d_max] are constants to the gradient. With r_max 1 and
    d_max 0 this is batch norm, as it always is in evaluation. Parameters and buffers have batch norm's names.
    """

    r_max, d_max = 1.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape and dtype."""
        if not self.training or (self.r_max == 1 and self.d_max == 0):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        with torch.no_grad():
            pixels = x.float().flatten(2)
            count = pixels.shape[0] * pixels.shape[2]
            mean = pixels.sum(2).sum(0) / count
            # On a CPU this takes a tenth of the time of torch.var_mean; it only decides r and d.
            squares = torch.linalg.vector_norm(pixels, dim=2).square().sum(0) / count
            var = (squares - mean.square()).clamp(min=0)
            running_std = (self.running_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.num_batches_tracked.add_(1)
        momentum = 0.1 if self.momentum is None else self.momentum
        scale, shift = self.weight * r, self.weight * d + self.bias  # gamma and beta after r and d
        return F.batch_norm(x, self.running_mean, self.running_var, scale, shift, True, momentum, self.eps)


class RenormLimits(Hook):
    """Sets r_max and d_max of all Batch Renormalization layers before each iteration."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def before_step(self, loop: Loop) -> None:
        limits = renorm_limits(self.settings, loop.state.iteration + 1, loop.total)
        for module in loop.state.model.modules():
            if isinstance(module, BatchRenorm2d):
                module.r_max, module.d_max = limits


def weight_normalized(model: nn.Module) -> nn.Module:
    """``model`` with all convolutions reparametrized as ``g * v / |v|``, one norm for each output channel."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            parametrizations.weight_norm(module)
    return model


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """State dict of ``model`` on the CPU, with the weights that reparametrized ones stand for."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.parametrizations.")}
            state[f"{name}.weight"] = module.weight
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
