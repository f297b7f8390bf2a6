"""Weight Standardization (Qiao et al. 2019) of convolution weights: each output channel gets mean 0 and deviation 1.

Shape letters: O output channels, n weights of each (input channels of a group times kernel area).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: name -> (whether the variance is divided by n - 1, epsilon, whether epsilon is added to the standard deviation
#: instead of the variance). "jhu": the authors' code and mmcv's ConvWS; "bit": BiT; "timm": timm's BiT models.
FORMULAS: dict[str, tuple[bool, float, bool]] = {
    "jhu": (True, 1e-5, True),
    "bit": (False, 1e-10, False),
    "timm": (False, 1e-8, False),
}


def standardize(weight: Tensor, formula: str) -> Tensor:
    """Standardized copy of ``weight`` (O, C, kH, kW), one of :data:`FORMULAS`, in its dtype and memory format."""
    if torch.is_grad_enabled() and weight.requires_grad:
        standardized: Tensor = _Standardize.apply(weight, formula)
        return standardized
    return _forward(weight, formula)[0]


def _forward(weight: Tensor, formula: str) -> tuple[Tensor, Tensor, Tensor]:
    """The standardized weights, 1 / divisor and deviation of each output channel (O, 1, 1, 1)."""
    unbiased, eps, outside = FORMULAS[formula]
    # torch.var_mean needs 20 times as long on a CPU, because it divides once for each weight.
    y = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    freedom = weight[0].numel() - int(unbiased)
    deviation = torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True) / math.sqrt(freedom)
    scale = (deviation + eps).reciprocal() if outside else (deviation.square() + eps).rsqrt()
    return y.mul_(scale), scale, deviation


class _Standardize(torch.autograd.Function):
    """Keeps the result, which the convolution keeps too, and reads it twice in the backward pass.

    With y = (w - mean) * r, where r is 1 / (s + eps) or 1 / sqrt(s^2 + eps), and m degrees of freedom in s:
    dw = r * (dy - mean(dy)) - k * y * sum(dy * y), with k = 1 / (m * s) or r / m.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, formula: str) -> Tensor:
        y, scale, deviation = _forward(weight, formula)
        ctx.save_for_backward(y, scale, deviation)
        ctx.formula = formula
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        y, scale, deviation = ctx.saved_tensors
        unbiased, _, outside = FORMULAS[ctx.formula]
        freedom = y[0].numel() - int(unbiased)
        factor = scale
        if outside:  # equal weights have no gradient direction
            factor = torch.where(deviation > 0, deviation.reciprocal(), 0.0)
        along = (grad * y).sum(dim=(1, 2, 3), keepdim=True).mul_(factor / freedom)
        result = torch.addcmul(-grad.mean(dim=(1, 2, 3), keepdim=True) * scale, grad, scale)
        return result.addcmul_(y, along, value=-1), None
